import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from dsv3.config.logger import (
    ConsoleLoggerConfig,
    LoggerConfig,
    NoLoggerConfig,
    TensorboardLoggerConfig,
    WandbLoggerConfig,
    WandbMode,
)
from dsv3.config.registry import choice_schema, config_groups
from dsv3.errors import InvalidValue

FOLDER = Path(__file__).parents[2] / "conf" / "logger"
CHOICES: dict[str, type[LoggerConfig]] = {
    "wandb": WandbLoggerConfig,
    "tensorboard": TensorboardLoggerConfig,
    "console": ConsoleLoggerConfig,
    "none": NoLoggerConfig,
}


@pytest.mark.parametrize("choice", CHOICES)
def test_every_choice_builds_a_logger_from_its_fields(choice: str) -> None:
    structured = OmegaConf.structured(CHOICES[choice])
    node = {str(key): structured[key] for key in structured}
    assert (node.pop("_recursive_"), node.pop("_convert_")) == (False, "object")
    module, name = str(node.pop("_target_")).rsplit(".", 1)
    logger = getattr(import_module(module), name)(**node)
    assert all(callable(getattr(logger, method)) for method in ("open", "log", "text", "finish"))


def test_each_choice_is_its_schema() -> None:
    assert config_groups()["logger"] == sorted(CHOICES)
    assert {choice: choice_schema("logger", choice) for choice in CHOICES} == CHOICES


def test_the_mode_is_read_by_its_lowercase_name() -> None:
    node = OmegaConf.merge(OmegaConf.structured(WandbLoggerConfig), {"mode": "offline", "tags": ["a"]})
    assert (node.mode, list(node.tags)) == (WandbMode.offline, ["a"])


@pytest.mark.parametrize("project", ["", "a/b", "100%", "x" * 129])
def test_a_project_name_that_wandb_refuses_is_refused_before(project: str) -> None:
    with pytest.raises(InvalidValue, match="project="):
        WandbLoggerConfig(project=project).validate()


def test_an_ordinary_project_name_passes() -> None:
    WandbLoggerConfig(project="My runs_2-b.c").validate()


def test_the_schema_imports_nothing_heavy() -> None:
    heavy = "{'torch', 'hydra', 'omegaconf', 'wandb', 'rich', 'matplotlib'}"
    program = f"import sys, dsv3.config.logger; print({heavy} & set(sys.modules))"
    root = Path(__file__).parents[2]
    run = subprocess.run(
        [sys.executable, "-c", program], cwd=root, capture_output=True, text=True, check=True
    )
    assert run.stdout.strip() == "set()"
