"""From what Hydra composed to a conversion that may begin: typed, with the model it is of."""

from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from dsv3.checkpoint.config import HFModelConfig
from dsv3.checkpoint.directory import MODEL_FILE, find_checkpoint
from dsv3.checkpoint.hf_config import model_from_hf
from dsv3.config import strict
from dsv3.convert.config import ConvertConfig, Direction
from dsv3.runtime.errors import UserError
from dsv3.runtime.stored_model import set_values, stored_model


def prepare_conversion(composed: DictConfig) -> ConvertConfig:
    """The checked config; model=hf becomes the model of the input, with what was typed of it changed."""
    direction = Direction(composed.direction) if not OmegaConf.is_missing(composed, "direction") else None
    if OmegaConf.get_type(composed, "model") is HFModelConfig:
        composed.model = _model(composed, direction)
    config: ConvertConfig = strict(composed)
    return config


def _model(composed: DictConfig, direction: Direction | None) -> Any:
    path = composed.model.path or composed.input
    if direction in (None, Direction.download) or not path:
        return None
    if not Path(path).is_dir():
        raise UserError(f"input={path} is no directory")
    if direction is Direction.dcp_to_hf and not composed.model.path:
        found = stored_model(find_checkpoint(path) / MODEL_FILE)
    else:
        found = OmegaConf.structured(model_from_hf(Path(path)))
    for key in set_values(composed.model) - {"path"}:
        OmegaConf.update(found, key, OmegaConf.select(composed.model, key))
    return found
