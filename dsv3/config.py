"""The whole configuration: its schema, the strict check of what Hydra composed, and `build`."""

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue

from dsv3.checkpoint.config import CheckpointConfig, HFModelConfig
from dsv3.convert.config import ConvertConfig
from dsv3.data import config as data_room
from dsv3.metrics import config as metrics_room
from dsv3.model.config import ModelConfig
from dsv3.parallel.config import CompileConfig, ParallelConfig, RecomputeConfig
from dsv3.planning.hardware import HardwareConfig
from dsv3.precision.config import PrecisionConfig
from dsv3.runtime.config import LaunchConfig, ProfileConfig, RunConfig, SlurmLaunchConfig
from dsv3.runtime.errors import InvalidValue, UserError, nearest
from dsv3.runtime.targets import check_target
from dsv3.tasks import config as tasks_room
from dsv3.training import config as training_room

CONF = Path(__file__).resolve().parent.parent / "conf"


@dataclass
class Config:
    """What train.py is told; one field a config group, and the plain nodes train, checkpoint, run."""

    task: tasks_room.TaskConfig
    model: ModelConfig
    parallel: ParallelConfig
    compile: CompileConfig
    precision: PrecisionConfig
    recompute: RecomputeConfig
    data: data_room.DataConfig
    tokenizer: data_room.TokenizerConfig
    optimizer: training_room.OptimizerConfig
    schedule: training_room.ScheduleConfig
    logger: metrics_room.LoggerConfig
    hardware: HardwareConfig
    launch: LaunchConfig
    profile: ProfileConfig
    train: training_room.TrainConfig = field(default_factory=training_room.TrainConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    run: RunConfig = field(default_factory=RunConfig)


SCHEMAS: dict[str, Any] = {
    "config": Config,
    "convert": ConvertConfig,
    "model": ModelConfig,
    "hf_model": HFModelConfig,
    "parallel": ParallelConfig,
    "compile": CompileConfig,
    "precision": PrecisionConfig,
    "recompute": RecomputeConfig,
    "hardware": HardwareConfig,
    "launch/local": LaunchConfig,
    "launch/slurm": SlurmLaunchConfig,
    "profile": ProfileConfig,
    "optimizer/adamw": training_room.AdamWConfig,
    "schedule/warmup_cosine": training_room.WarmupCosineConfig,
    "schedule/wsd": training_room.WSDConfig,
    "schedule/steps": training_room.StepsConfig,
    "schedule/deepseek_v3": training_room.DeepSeekV3Config,
    "data/stdlib": data_room.StdlibDataConfig,
    "data/text": data_room.TextDataConfig,
    "data/tokens": data_room.TokensDataConfig,
    "tokenizer/trained": data_room.TrainedTokenizerConfig,
    "tokenizer/local": data_room.LocalTokenizerConfig,
    "logger/wandb": metrics_room.WandbLoggerConfig,
    "logger/tensorboard": metrics_room.TensorboardLoggerConfig,
    "logger/console": metrics_room.ConsoleLoggerConfig,
    "logger/none": metrics_room.NoLoggerConfig,
    "task/train": tasks_room.TrainTaskConfig,
    "task/evaluate": tasks_room.EvaluateTaskConfig,
    "task/generate": tasks_room.GenerateTaskConfig,
    "task/plan": tasks_room.PlanTaskConfig,
    "task/verify": tasks_room.VerifyTaskConfig,
    "task/compare": tasks_room.CompareTaskConfig,
}
"""Schema nodes by their name under the `schema` group, which the files of conf/ extend."""


def register() -> None:
    """Make the schemas known to Hydra; the files of conf/ name them as `/schema/NAME@_here_`."""
    store = ConfigStore.instance()
    for name, node in SCHEMAS.items():
        group, _, last = f"schema/{name}".rpartition("/")
        store.store(name=last, group=group, node=node)


def strict(node: DictConfig, allow_targets: Sequence[str] = ()) -> Any:
    """The dataclasses of a composed `node`, or a UserError for anything the schema does not know.

    Hydra's own check lets `+key=` and `++key=` pass; this one does not.
    """
    for path, choices in _unknown_keys(node, ""):
        key = path.rpartition(".")[2]
        raise UserError(f"unknown key '{path}'.{nearest(key, choices)} Known here: {', '.join(choices)}")
    schema: Any = OmegaConf.get_type(node)
    for key in (f.name for f in fields(schema) if f.name not in node):
        raise UserError(f"{key} is missing: a key cannot be taken out (~{key})")
    try:
        typed = OmegaConf.to_object(node)
    except MissingMandatoryValue as error:
        raise UserError(f"{error.full_key} is missing: give it a value ({error.full_key}=...)") from None
    validate(typed, allow_targets)
    return typed


def validate(node: Any, allow_targets: Sequence[str] = (), path: str = "") -> None:
    """Let every dataclass below `node` check itself and every `_target_` be one that may be built."""
    for f in fields(node):
        value = getattr(node, f.name)
        if is_dataclass(value):
            validate(value, allow_targets, f"{path}{f.name}.")
        elif f.name == "_target_" and value != f.default:
            settings = [f.name for f in fields(node) if not f.name.startswith("_")]
            check_target(value, f"{path}_target_", allow_targets, settings)
        elif not f.metadata.get("unbounded"):
            _require_finite(f"{path}{f.name}", value)
    if hasattr(node, "validate"):
        try:
            node.validate()
        except InvalidValue as error:
            raise InvalidValue(f"{path}{error.key}", error.value, error.allowed) from None


def _require_finite(key: str, value: Any) -> None:
    """InvalidValue for nan and inf, which pass every comparison or fail none."""
    numbers = value if isinstance(value, list | tuple) else [value]
    if any(isinstance(number, float) and not math.isfinite(number) for number in numbers):
        raise InvalidValue(key, value, "must be a finite number")


def build(node: Any, **runtime: Any) -> Any:
    """Instantiate the `_target_` of a checked config node, with `runtime` arguments beside its fields."""
    try:
        # instantiate() unescapes strings twice: once when it resolves the node, once when it reads it.
        return instantiate(literal(literal(node)), **runtime)
    except InstantiationException as error:
        raise error.__cause__ or error from None  # what the constructor raised, a UserError say


def plain(node: Any) -> dict[str, Any]:
    """A config dataclass as plain YAML values, enums by name."""
    container = OmegaConf.to_container(OmegaConf.structured(node), enum_to_str=True)
    assert isinstance(container, dict)
    return {str(key): value for key, value in container.items()}


def _unknown_keys(node: DictConfig, path: str) -> Iterator[tuple[str, list[str]]]:
    schema = OmegaConf.get_type(node)
    known = [f.name for f in fields(schema)] if schema and is_dataclass(schema) else None
    for key in map(str, node):
        if known is not None and key not in known:
            yield f"{path}{key}", [name for name in known if not name.startswith("_")]
        elif not OmegaConf.is_missing(node, key) and isinstance(node[key], DictConfig):
            yield from _unknown_keys(node[key], f"{path}{key}.")


def literal(value: Any) -> Any:
    """The same value with its strings taken as they are: OmegaConf would read `${...}` in them."""
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{f.name: literal(getattr(value, f.name)) for f in fields(value)})
    if isinstance(value, dict):
        return {key: literal(item) for key, item in value.items()}
    if isinstance(value, list):
        return [literal(item) for item in value]
    if isinstance(value, str):
        # A run of backslashes before ${ is halved by OmegaConf, so it is doubled here.
        return re.sub(r"(\\*)\$\{", lambda found: str(found[1]) * 2 + r"\${", value)
    return value
