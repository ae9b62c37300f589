"""Model nodes: what has been set of one, and one that lies in a file."""

from pathlib import Path

import yaml
from omegaconf import DictConfig, OmegaConf

from dsv3.config import literal
from dsv3.model.config import ModelConfig
from dsv3.runtime.errors import UserError


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
        stored = OmegaConf.merge(OmegaConf.structured(ModelConfig), literal(content))
        assert isinstance(stored, DictConfig)
        return stored
    except Exception as error:
        raise UserError(f"{path} is not a model: {str(error).splitlines()[0]}") from None
