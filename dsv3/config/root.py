"""Define the root of the configuration and register every schema with Hydra."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dsv3.config.checkpoint import CheckpointConfig
from dsv3.config.convert import ConvertConfig
from dsv3.config.data import (
    DataConfig,
    LocalTokenizerConfig,
    StdlibDataConfig,
    TextDataConfig,
    TokenizerConfig,
    TokensDataConfig,
    TrainedTokenizerConfig,
)
from dsv3.config.hardware import HardwareConfig
from dsv3.config.launch import LaunchConfig, ProfileConfig, RunConfig, SlurmLaunchConfig
from dsv3.config.logger import (
    ConsoleLoggerConfig,
    LoggerConfig,
    NoLoggerConfig,
    TensorboardLoggerConfig,
    WandbLoggerConfig,
)
from dsv3.config.model import HFModelConfig, ModelConfig
from dsv3.config.parallel import CompileConfig, ParallelConfig, RecomputeConfig
from dsv3.config.precision import PrecisionConfig
from dsv3.config.task import (
    CompareTaskConfig,
    EvaluateTaskConfig,
    GenerateTaskConfig,
    PlanTaskConfig,
    TaskConfig,
    TrainTaskConfig,
    VerifyTaskConfig,
)
from dsv3.config.training import (
    AdamWConfig,
    DeepSeekV3Config,
    OptimizerConfig,
    ScheduleConfig,
    StepsConfig,
    TrainConfig,
    WarmupCosineConfig,
    WSDConfig,
)

_PACKAGE = Path(__file__).resolve().parents[1]
CONF = next(folder for folder in (_PACKAGE / "conf", _PACKAGE.parent / "conf") if folder.is_dir())
"""The config groups: beside the package in a checkout, inside of it in an installed wheel."""

LAYOUTS = "layouts"
"""ParallelDims by model and preset: the choice of the other two decides here, so it is no group of its own."""


@dataclass
class Config:
    """What train.py is told; one field a config group, and the plain nodes train, checkpoint, run."""

    task: TaskConfig
    model: ModelConfig
    parallel: ParallelConfig
    compile: CompileConfig
    precision: PrecisionConfig
    recompute: RecomputeConfig
    data: DataConfig
    tokenizer: TokenizerConfig
    optimizer: OptimizerConfig
    schedule: ScheduleConfig
    logger: LoggerConfig
    hardware: HardwareConfig
    launch: LaunchConfig
    profile: ProfileConfig
    train: TrainConfig = field(default_factory=TrainConfig)
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
    "optimizer/adamw": AdamWConfig,
    "schedule/warmup_cosine": WarmupCosineConfig,
    "schedule/wsd": WSDConfig,
    "schedule/steps": StepsConfig,
    "schedule/deepseek_v3": DeepSeekV3Config,
    "data/stdlib": StdlibDataConfig,
    "data/text": TextDataConfig,
    "data/tokens": TokensDataConfig,
    "tokenizer/trained": TrainedTokenizerConfig,
    "tokenizer/local": LocalTokenizerConfig,
    "logger/wandb": WandbLoggerConfig,
    "logger/tensorboard": TensorboardLoggerConfig,
    "logger/console": ConsoleLoggerConfig,
    "logger/none": NoLoggerConfig,
    "task/train": TrainTaskConfig,
    "task/evaluate": EvaluateTaskConfig,
    "task/generate": GenerateTaskConfig,
    "task/plan": PlanTaskConfig,
    "task/verify": VerifyTaskConfig,
    "task/compare": CompareTaskConfig,
}
"""Schema nodes by their name under the `schema` group, which the files of conf/ extend."""


def register() -> None:
    """Make the schemas known to Hydra; the files of conf/ name them as `/schema/NAME@_here_`."""
    from hydra.core.config_store import ConfigStore  # planning imports this file, and does without hydra

    store = ConfigStore.instance()
    for name, node in SCHEMAS.items():
        group, _, last = f"schema/{name}".rpartition("/")
        store.store(name=last, group=group, node=node)
