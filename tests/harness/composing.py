"""Compose conf/ in the test process, without a command line and without torch."""

from omegaconf import DictConfig

from dsv3.config.overrides import compose as compose_overrides
from dsv3.config.root import Config
from dsv3.config.strict import strict
from dsv3.launch.prepare import resolve_model


def compose(overrides: list[str], root: str = "config") -> DictConfig:
    """Return train.py's config under `overrides`; with root `convert`, that of convert.py."""
    return compose_overrides(overrides, root=root)


def strict_config(overrides: list[str]) -> Config:
    """Return the checked config of train.py under `overrides`, with the model's preset resolved."""
    composed = compose(overrides)
    resolve_model(composed, [override.split("=")[0] for override in overrides])
    config: Config = strict(composed)
    return config
