"""Turn a composed config into a planned job: resolve the model node, check types, plan; imports no torch."""

import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

import yaml
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from dsv3.checkpoint.directory import MODEL_FILE, find_checkpoint, is_hf_checkpoint
from dsv3.checkpoint.manifest import verify_description
from dsv3.config.model import HFModelConfig, ModelConfig
from dsv3.config.overrides import split_override
from dsv3.config.registry import LAYOUTS, RECIPES, RECIPES_LR, recipes
from dsv3.config.root import Config
from dsv3.config.strict import escape_interpolation, strict
from dsv3.config.upgrade import upgrade_node
from dsv3.errors import UserError
from dsv3.hf.config_json import model_from_hf
from dsv3.launch.job import Job, plan_job
from dsv3.launch.run_dir import CONFIG_FILE


def changed_keys(model: DictConfig, path: str = "") -> set[str]:
    """Return the keys of model=hf that an experiment or a file has set, beside its defaults."""
    keys: set[str] = set()
    defaults = OmegaConf.structured(OmegaConf.get_type(model))
    for key in map(str, model):
        if OmegaConf.is_missing(model, key):
            continue
        if isinstance(model[key], DictConfig):
            keys |= changed_keys(model[key], f"{path}{key}.")
        elif key in defaults and (OmegaConf.is_missing(defaults, key) or model[key] != defaults[key]):
            keys.add(f"{path}{key}")
    return keys


def stored_model(path: Path, inside: bool = False) -> DictConfig:
    """Return the model of a model.yaml, or with `inside` of a run's config.yaml, by today's names."""
    try:
        content = yaml.safe_load(path.read_text())
        content = upgrade_node(content["model"] if inside else content, "model")
        stored = OmegaConf.merge(OmegaConf.structured(ModelConfig), escape_interpolation(content))
        assert isinstance(stored, DictConfig)
        return stored
    except Exception as error:
        raise UserError(f"{path} is not a model: {str(error).splitlines()[0]}") from None


def prepare_job(composed: DictConfig) -> Job:
    """Check everything that can be checked before a process starts, and plan; UserError otherwise."""
    hydra = HydraConfig.get()
    overrides = list(hydra.overrides.task)
    typed = {override: pair for override in overrides if (pair := split_override(override))}
    keys = {key for key, _ in typed.values()}
    if LAYOUTS in keys:
        raise UserError(
            f"{LAYOUTS} cannot be set directly: model and parallel choose it, parallel.degrees.* changes it"
        )
    if {RECIPES, RECIPES_LR} & keys:
        raise UserError(f"{RECIPES} cannot be set directly: model chooses it; type the keys it sets")
    for override, (key, value) in typed.items():
        if re.fullmatch(r"\{\s*\}", value):
            raise UserError(f"{override}: an empty node sets nothing; name its keys, {key}.KEY=VALUE")
    resolve_model(composed, keys)
    config: Config = strict(composed, OmegaConf.select(composed, "run.allow_targets") or ())
    sweep = Path(hydra.runtime.output_dir) if hydra.mode is RunMode.MULTIRUN else None
    job = plan_job(config, overrides, sweep)
    job.resume_flags = [
        *(
            f"--config-dir={source.path}"
            for source in hydra.runtime.config_sources
            if source.provider == "command-line"
        ),
        *(override for override, (key, _) in typed.items() if key.lstrip("+") == "run.allow_targets"),
    ]
    if job.config.task.trains:
        warmup, steps = job.config.schedule.warmup_steps, job.config.train.steps
        if warmup >= steps:
            job.notes.append(
                f"the warm-up is longer than the run: schedule.warmup_steps={warmup}, train.steps={steps}"
            )
        job.notes += _recipe_notes(job.config, str(hydra.runtime.choices.get("model")))
    return job


def _recipe_notes(config: Config, model: str) -> list[str]:
    """Return what the run took from the recipe of its model, and what else the model's report did."""
    row = recipes().get(model)
    if row is None:
        return []
    nodes = {node: values for node, values in row.items() if isinstance(values, dict)}
    taken = [
        f"{node}.{key}={value:g}"
        for node, values in nodes.items()
        for key, value in values.items()
        if getattr(getattr(config, node), key) == value
    ]
    return [
        f"recipe of model={model}, {row['source']}: {' '.join(taken) or 'nothing of it was left'}",
        f"the report also has {row['report']}; this run has {config.schedule._target_.rpartition('.')[2]}, "
        f"{config.train.batch:,} sequences of {config.train.length:,} tokens per step",
    ]


def resolve_model(composed: DictConfig, keys: Collection[str]) -> None:
    """Replace the model node by the model that lies elsewhere; `model.*` among `keys` stays.

    The model comes from model.path with model=hf, or from checkpoint.load unless `model` was typed. A resumed
    run has its model in its own config.yaml: the place where it came from may be gone.
    """
    from_hf = OmegaConf.get_type(composed, "model") is HFModelConfig
    from_checkpoint = OmegaConf.select(composed, "checkpoint.load") and not {"model", "experiments"} & set(
        keys
    )
    if not from_hf and not from_checkpoint:
        return
    path = composed.model.path if from_hf else None
    task: Any = OmegaConf.get_type(composed, "task")
    if getattr(task, "path_is_model_path", False) and composed.task.path is None:
        composed.task.path = escape_interpolation(path)
    changed = {key.removeprefix("model.") for key in keys if key.startswith("model.")}
    changed |= changed_keys(composed.model) if from_hf else set()
    if composed.run.resume:
        found = stored_model(Path(composed.run.dir) / CONFIG_FILE, inside=True)
    elif from_hf:
        found = OmegaConf.structured(model_from_hf(_hf_directory(path)))
    elif is_hf_checkpoint(checkpoint := find_checkpoint(composed.checkpoint.load)):
        found = OmegaConf.structured(model_from_hf(checkpoint))
    else:
        verify_description(checkpoint)
        file = checkpoint / MODEL_FILE
        if not file.is_file():
            raise UserError(f"{file} is missing: say which model it is, model=...")
        found = stored_model(file)
    for key in changed - {"path"}:
        OmegaConf.update(found, key, OmegaConf.select(composed.model, key))
    composed.model = found


def _hf_directory(path: str | None) -> Path:
    """Return model.path; UserError where it is no directory."""
    if not path:
        raise UserError("model.path is missing: give a HuggingFace checkpoint, model.path=DIR")
    if not Path(path).is_dir():
        raise UserError(f"model.path={path} is no directory: give a HuggingFace checkpoint, model.path=DIR")
    return Path(path)
