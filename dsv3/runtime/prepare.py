"""From what Hydra composed to a job that may run: typed, completed, planned; imports no torch."""

from pathlib import Path

import yaml
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from dsv3.checkpoint.directory import MODEL_FILE, find_checkpoint
from dsv3.config import Config, literal, strict
from dsv3.model.config import ModelConfig
from dsv3.runtime.errors import UserError
from dsv3.runtime.job import Job, plan_job
from dsv3.runtime.quoting import split_override
from dsv3.runtime.rundir import CONFIG_FILE


def prepare_job(composed: DictConfig) -> Job:
    """Check everything that can be checked before a process starts, and plan; UserError otherwise."""
    hydra = HydraConfig.get()
    overrides = list(hydra.overrides.task)
    keys = {pair[0] for pair in map(split_override, overrides) if pair}
    if OmegaConf.select(composed, "checkpoint.load") and not keys & {"model", "experiments"}:
        _take_model_of_checkpoint(composed, keys)
    config: Config = strict(composed, OmegaConf.select(composed, "run.allow_targets") or ())
    sweep = Path(hydra.runtime.output_dir) if hydra.mode is RunMode.MULTIRUN else None
    return plan_job(config, overrides, sweep)


def carry_out(composed: DictConfig) -> float | None:
    """What train.py does with a composed config; a sweep's objective is the result."""
    from dsv3.runtime.launch import launch

    return launch(prepare_job(composed))


def _take_model_of_checkpoint(composed: DictConfig, keys: set[str]) -> None:
    """Replace the model node by the one stored with checkpoint.load; typed `model.*` keys stay.

    A resumed run has it in its own config.yaml: the checkpoint it was begun from may be gone.
    """
    resumed = composed.run.resume
    path = Path(composed.run.dir) / CONFIG_FILE if resumed else _model_file(composed.checkpoint.load)
    try:
        content = yaml.safe_load(path.read_text())
        content = content["model"] if resumed else content
        stored = OmegaConf.merge(OmegaConf.structured(ModelConfig), literal(content))
    except Exception as error:
        raise UserError(f"{path} is not a model: {str(error).splitlines()[0]}") from None
    for key in keys:
        if key.startswith("model."):
            OmegaConf.update(stored, key.removeprefix("model."), OmegaConf.select(composed, key))
    composed.model = stored


def _model_file(checkpoint: str) -> Path:
    path = find_checkpoint(checkpoint) / MODEL_FILE
    if not path.is_file():
        raise UserError(f"{path} is missing: say which model it is, model=...")
    return path
