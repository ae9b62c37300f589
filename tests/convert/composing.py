"""Composes convert.py's configuration in the test process."""

from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

from dsv3.config import CONF, register


def compose_convert(overrides: list[str]) -> DictConfig:
    """The root config of convert.py under `overrides`."""
    register()
    with initialize_config_dir(str(CONF), version_base=None):
        return compose("convert", overrides)
