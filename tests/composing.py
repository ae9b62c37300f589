"""Composes conf/ in the test process, without a command line."""

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from omegaconf import DictConfig

from dsv3.config.root import CONF, register


def compose(overrides: list[str], root: str = "config") -> DictConfig:
    """The root config under `overrides`, as train.py's function receives it (of `convert`, convert.py's)."""
    register()
    with initialize_config_dir(str(CONF), version_base=None):
        return hydra_compose(root, overrides)
