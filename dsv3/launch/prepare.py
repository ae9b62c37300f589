"""Model nodes: what has been set of one, and one that lies in a file.

From what Hydra composed to a job that may run: typed, completed, planned; imports no torch.
"""

import re
from collections.abc import Collection
from pathlib import Path

import yaml
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from dsv3.checkpoint.directory import MODEL_FILE, find_checkpoint, is_released
from dsv3.checkpoint.manifest import verify_description
from dsv3.config.model import HFModelConfig, ModelConfig
from dsv3.config.overrides import split_override
from dsv3.config.root import LAYOUTS, Config
from dsv3.config.strict import escape_interpolation, strict
from dsv3.config.task import VerifyTaskConfig
from dsv3.errors import UserError
from dsv3.hf.config_json import model_from_hf
from dsv3.launch.job import Job, plan_job
from dsv3.launch.run_dir import CONFIG_FILE


def set_values(model: DictConfig, path: str = "") -> set[str]:
    """The keys of model=hf that an experiment or a file has set, beside its defaults."""
    keys: set[str] = set()
    defaults = OmegaConf.structured(OmegaConf.get_type(model))
    for key in map(str, model):
        if OmegaConf.is_missing(model, key):
            continue
        if isinstance(model[key], DictConfig):
            keys |= set_values(model[key], f"{path}{key}.")
        elif key in defaults and (OmegaConf.is_missing(defaults, key) or model[key] != defaults[key]):
            keys.add(f"{path}{key}")
    return keys


def stored_model(path: Path, inside: bool = False) -> DictConfig:
    """The model of a model.yaml, or `inside` a run's config.yaml."""
    try:
        content = yaml.safe_load(path.read_text())
        content = content["model"] if inside else content
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
            f"{LAYOUTS} is not for typing: model and parallel choose it, parallel.degrees.* changes it"
        )
    for override, (key, value) in typed.items():
        if re.fullmatch(r"\{\s*\}", value):
            raise UserError(f"{override}: an empty node sets nothing; name its keys, {key}.KEY=VALUE")
    resolve_model(composed, keys)
    config: Config = strict(composed, OmegaConf.select(composed, "run.allow_targets") or ())
    sweep = Path(hydra.runtime.output_dir) if hydra.mode is RunMode.MULTIRUN else None
    return plan_job(config, overrides, sweep)


def resolve_model(composed: DictConfig, keys: Collection[str]) -> None:
    """Put the model that lies elsewhere in the place of the model node; `model.*` among `keys` stays.

    It comes from model.path with model=hf, or from checkpoint.load unless `model` was typed. A resumed
    run has it in its own config.yaml: where it came from may be gone.
    """
    from_hf = OmegaConf.get_type(composed, "model") is HFModelConfig
    from_checkpoint = OmegaConf.select(composed, "checkpoint.load") and not {"model", "experiments"} & set(
        keys
    )
    if not from_hf and not from_checkpoint:
        return
    path = composed.model.path if from_hf else None
    if OmegaConf.get_type(composed, "task") is VerifyTaskConfig and composed.task.path is None:
        composed.task.path = escape_interpolation(path)
    changed = {key.removeprefix("model.") for key in keys if key.startswith("model.")}
    changed |= set_values(composed.model) if from_hf else set()
    if composed.run.resume:
        found = stored_model(Path(composed.run.dir) / CONFIG_FILE, inside=True)
    elif from_hf:
        found = OmegaConf.structured(model_from_hf(_hf_directory(path)))
    elif is_released(checkpoint := find_checkpoint(composed.checkpoint.load)):
        found = OmegaConf.structured(model_from_hf(checkpoint))
    else:
        found = stored_model(_model_file(checkpoint))
    for key in changed - {"path"}:
        OmegaConf.update(found, key, OmegaConf.select(composed.model, key))
    composed.model = found


def _hf_directory(path: str | None) -> Path:
    if not path:
        raise UserError("model.path is missing: give a HuggingFace checkpoint, model.path=DIR")
    if not Path(path).is_dir():
        raise UserError(f"model.path={path} is no directory: give a HuggingFace checkpoint, model.path=DIR")
    return Path(path)


def _model_file(directory: Path) -> Path:
    verify_description(directory)
    path = directory / MODEL_FILE
    if not path.is_file():
        raise UserError(f"{path} is missing: say which model it is, model=...")
    return path
