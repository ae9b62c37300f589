"""Compose conf/ in the test process, without a command line and without torch."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from unittest.mock import patch

from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig

from dsv3.config.overrides import compose as compose_overrides
from dsv3.config.root import Config
from dsv3.config.strict import strict
from dsv3.launch.checkpoint_defaults import Composition, compose_over_checkpoint


def compose(overrides: list[str], root: str = "config") -> DictConfig:
    """Return train.py's config under `overrides`; with root `convert`, that of convert.py."""
    with store_uncopied():
        return compose_overrides(overrides, root=root)


@contextmanager
def store_uncopied() -> Iterator[None]:
    """Let Hydra copy its repository, per composition, without all schemas: it copies each as it loads it."""
    with patch.object(ConfigStore, "__deepcopy__", lambda store, _: store, create=True):
        yield


def strict_config(overrides: list[str]) -> Config:
    """Return the checked config of train.py under `overrides`, with the model's preset resolved.

    Its precision is that of a CPU where none is chosen: tests compare in fp32, on a machine with GPUs too.
    """
    composed = compose_over_checkpoint(compose(overrides), Composition(overrides))
    config: Config = strict(composed)
    return replace(config, precision=config.precision.on("cpu"))
