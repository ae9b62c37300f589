"""Check what convert.py was asked for: from the composed config to a typed one with its model."""

from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from dsv3.checkpoint.directory import MANIFEST_FILE, MODEL_FILE, find_checkpoint, is_hf_checkpoint
from dsv3.config.convert import ConvertConfig, Direction
from dsv3.config.model import HFModelConfig
from dsv3.config.strict import strict
from dsv3.errors import UserError, require
from dsv3.hf.config_json import model_from_hf
from dsv3.launch.prepare import changed_keys, stored_model


def is_verify_only(config: Any) -> bool:
    """Return whether the output is complete and only has to be read again: then no input is needed."""
    asked = config.verify and not config.plan and bool(config.output)
    return asked and (Path(config.output) / MANIFEST_FILE).is_file()


def prepare_conversion(composed: DictConfig) -> ConvertConfig:
    """Return the checked config.

    model=hf becomes the model of the input, with the keys changed that were typed.
    """
    if OmegaConf.is_missing(composed, "direction"):
        raise UserError(f"direction is missing: give direction={'|'.join(each.name for each in Direction)}")
    reads = composed.direction is not Direction.download and not is_verify_only(composed)
    if reads and composed.input:
        _check_input(composed.direction, composed.input)
    if OmegaConf.get_type(composed, "model") is HFModelConfig:
        composed.model = _model(composed) if reads else None
    config: ConvertConfig = strict(composed)
    needs_input = reads and not (config.plan and config.model is not None)
    require(
        not needs_input or bool(config.input), "input", config.input, "give the directory to read, input=DIR"
    )
    return config


def _check_input(direction: Direction, path: str) -> None:
    """Raise UserError unless the input is of the kind that the direction reads."""
    directory = Path(path)
    if not directory.is_dir():
        raise UserError(f"input={path} is no directory")
    if direction is Direction.dcp_to_hf:
        if is_hf_checkpoint(directory) or any(directory.glob("*.safetensors")):
            other = "direction=hf_to_dcp and hf_to_hf read it"
            raise UserError(f"input={path} is a HuggingFace checkpoint: {other}")
        _checkpoint(path)
    elif (directory / ".metadata").is_file() or (directory / "config.yaml").is_file():
        raise UserError(f"input={path} is a checkpoint or run of ours: direction=dcp_to_hf reads it")
    elif not (directory / "config.json").is_file():
        raise UserError(f"input={path} holds no config.json: give a HuggingFace checkpoint")


def _checkpoint(path: str) -> Path:
    """Return the checkpoint of a run, step or DCP directory."""
    try:
        return find_checkpoint(path)
    except UserError as error:
        raise UserError(str(error).replace("checkpoint.load=", "input=", 1)) from None


def _model(composed: DictConfig) -> Any:
    """Return the model of model.path, or else of the input; None where neither is given."""
    given, source = composed.model.path, composed.input
    if not (given or source):
        return None
    if given and not Path(given).is_dir():
        raise UserError(f"model.path={given} is no directory")
    if composed.direction is Direction.dcp_to_hf and not given:
        found = stored_model(_checkpoint(source) / MODEL_FILE)
    else:
        found = OmegaConf.structured(model_from_hf(Path(given or source)))
    for key in changed_keys(composed.model) - {"path"}:
        OmegaConf.update(found, key, OmegaConf.select(composed.model, key))
    return found
