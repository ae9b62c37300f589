"""Check what convert.py was asked for: from the composed config to a typed one with its model."""

import sys
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from dsv3.checkpoint.directory import MANIFEST_FILE, find_checkpoint, is_hf_checkpoint
from dsv3.config.convert import READS, ConvertConfig, Direction, StoredType
from dsv3.config.model import HFModelConfig
from dsv3.config.model_difference import INIT_STD
from dsv3.config.overrides import as_typed, split_override
from dsv3.config.registry import Stored
from dsv3.config.strict import strict
from dsv3.errors import UserError, repository_hint, require
from dsv3.hf.config_json import model_from_hf
from dsv3.launch.checkpoint_defaults import (
    Composition,
    checkpoint_model,
    described_model,
    filled,
    plain_model,
)


def is_verify_only(config: Any) -> bool:
    """Return whether the output is complete and only has to be read again: then no input is needed."""
    asked = config.verify and not config.plan and bool(config.output)
    return asked and (Path(config.output) / MANIFEST_FILE).is_file()


def prepare_conversion(composed: DictConfig, command: Composition | None = None) -> ConvertConfig:
    """Return the checked config of `command`, by default that of this job.

    model=hf becomes the model of the input, with the keys changed that were typed.
    """
    if OmegaConf.is_missing(composed, "direction"):
        raise UserError(f"direction is missing: give direction={'|'.join(each.name for each in Direction)}")
    command = command or Composition.of_this_job("convert")
    _refuse_unread(composed, command.overrides)
    reads = composed.direction is not Direction.download and not is_verify_only(composed)
    if reads and composed.input:
        _check_input(composed.direction, composed.input)
    if OmegaConf.get_type(composed, "model") is HFModelConfig:
        composed = _over_input(composed, command) if reads else composed
        if OmegaConf.get_type(composed, "model") is HFModelConfig:
            composed.model = None
    config: ConvertConfig = strict(composed)
    if reads and config.input and config.model is not None:
        config = _compared_with_input(config, command)
    needs_input = reads and not (config.plan and config.model is not None)
    require(
        not needs_input or bool(config.input), "input", config.input, "give the directory to read, input=DIR"
    )
    return config


def _refuse_unread(composed: DictConfig, overrides: Sequence[str]) -> None:
    """Raise UserError for typed keys that the direction does not read; tell those of a finished output."""
    direction = composed.direction
    typed = {as_typed(override): pair[0] for override in overrides if (pair := split_override(override))}
    others = {f.name for f in fields(ConvertConfig)} - READS[direction]
    unread = [told for told, key in typed.items() if key.partition(".")[0] in others]
    if unread:
        do, them = ("does", "it") if len(unread) == 1 else ("do", "them")
        raise UserError(f"{' '.join(unread)} {do} nothing with direction={direction.name}: leave {them} out")
    for told, key in typed.items():
        if key == "speeds" and not composed.plan:
            raise UserError(f"{told} is for an estimate alone: add plan=true, or leave it out")
        if key.partition(".")[0] == "fp8" and composed.dtype is not StoredType.fp8:
            raise UserError(f"{told} is for exports in fp8: add dtype=fp8, or leave it out")
        if key == "scale_fmt" and composed.dtype is not StoredType.fp8 and composed.scale_fmt is not None:
            raise UserError(f"{told} is the format of fp8 scales: add dtype=fp8, or leave it out")
    if is_verify_only(composed):
        idle = [told for told, key in typed.items() if key not in ("direction", "output", "verify", "plan")]
        about = f"output={composed.output} is complete and only read again"
        print(f"{about}{': not used are ' * bool(idle)}{' '.join(idle)}", file=sys.stderr)


def _check_input(direction: Direction, path: str) -> None:
    """Raise UserError unless the input is of the kind that the direction reads."""
    directory = Path(path)
    if not directory.is_dir():
        raise UserError(f"input={path} is no directory{repository_hint(path)}")
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


def _compared_with_input(config: ConvertConfig, command: Composition) -> ConvertConfig:
    """Return the config, and print a line on the numbers that were typed other than the input has them.

    A preset's init_std does not replace the input's: no weight is drawn here. UserError for a number that
    differs and was not typed as model.KEY=.
    """
    assert config.model is not None
    source = str(config.input)
    directory = _checkpoint(source) if config.direction is Direction.dcp_to_hf else Path(source)
    stored = described_model(directory)
    for note in command.compared(f"input={source}", stored, config.model):
        print(note, file=sys.stderr)
    if stored is None or INIT_STD in command.keys:
        return config
    return replace(config, model=replace(config.model, init_std=stored.init_std))


def _over_input(composed: DictConfig, command: Composition) -> DictConfig:
    """Return the config with the model of model.path, or else of the input, and what was typed over it."""
    given, source = composed.model.path, composed.input
    if not (given or source):
        return composed
    if given and not Path(given).is_dir():
        raise UserError(f"model.path={given} is no directory{repository_hint(given)}")
    if composed.direction is Direction.dcp_to_hf and not given:
        model = checkpoint_model(_checkpoint(source))
    else:
        model = model_from_hf(Path(given or source))
    composed = command.over(Stored(hf_model=filled(model, given)))
    plain_model(composed)
    return composed
