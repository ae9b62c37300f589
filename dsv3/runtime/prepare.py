"""From what Hydra composed to a job that may run: typed, completed, planned; imports no torch."""

import re
from collections.abc import Collection
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from dsv3.checkpoint.config import HFModelConfig
from dsv3.checkpoint.directory import MODEL_FILE, find_checkpoint, is_released
from dsv3.checkpoint.manifest import verify_description
from dsv3.checkpoint.released.config import model_from_hf
from dsv3.config import Config, literal, strict
from dsv3.runtime.errors import UserError
from dsv3.runtime.groups import LAYOUTS
from dsv3.runtime.job import Job, plan_job
from dsv3.runtime.quoting import split_override
from dsv3.runtime.rundir import CONFIG_FILE
from dsv3.runtime.stored_model import set_values, stored_model
from dsv3.tasks.config import VerifyTaskConfig


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


def carry_out(composed: DictConfig) -> float | None:
    """What train.py does with a composed config; a sweep's objective is the result."""
    from dsv3.runtime.launch import launch

    return launch(prepare_job(composed))


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
        composed.task.path = literal(path)
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
