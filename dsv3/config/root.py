"""The root schema of train.py's configuration; importing it registers every schema."""

from dataclasses import dataclass, field

from dsv3.config.checkpoint import CheckpointConfig
from dsv3.config.convert import ConvertConfig  # noqa: F401  # registers itself
from dsv3.config.data import (
    DataConfig,
    TokenizerConfig,
)
from dsv3.config.hardware import HardwareConfig
from dsv3.config.launch import LaunchConfig, ProfileConfig, RunConfig
from dsv3.config.logger import (
    LoggerConfig,
)
from dsv3.config.mixture import MixtureDataConfig  # noqa: F401  # registers itself
from dsv3.config.model import ModelConfig
from dsv3.config.optimizer import OptimizerConfig
from dsv3.config.parallel import CompileConfig, ParallelConfig, RecomputeConfig
from dsv3.config.precision import PrecisionConfig
from dsv3.config.registry import schema
from dsv3.config.task import (
    TaskConfig,
)
from dsv3.config.training import (
    ScheduleConfig,
    TrainConfig,
)

EXPERIMENTS = "A named study that sets values of other groups; its question and its result are in NAME.md."
"""The description of the `experiments` group, which is no field of Config: it sets values of the others."""


@schema("config")
@dataclass
class Config:
    """The configuration of train.py: a field per config group, and the plain nodes train, checkpoint, run."""

    task: TaskConfig
    """Work: train, evaluate, generate, replay, plan, search, fit, calibrate, verify or compare."""
    model: ModelConfig
    """Size and architecture of the model."""
    parallel: ParallelConfig
    """Split of the model and the batch over ranks."""
    compile: CompileConfig
    """torch.compile of the layers."""
    precision: PrecisionConfig
    """Number formats of matmuls and of the optimizer's moments."""
    recompute: RecomputeConfig
    """Activation checkpointing: memory against time."""
    data: DataConfig
    """Source of the training text."""
    tokenizer: TokenizerConfig
    """Tokenizer of the training text."""
    optimizer: OptimizerConfig
    """Optimizer and its constants."""
    schedule: ScheduleConfig
    """Learning rate over the run."""
    logger: LoggerConfig
    """Recipient of the metrics besides metrics.jsonl."""
    hardware: HardwareConfig
    """Device that the plan computes with."""
    launch: LaunchConfig
    """Number of processes, and the way to start them."""
    profile: ProfileConfig
    """torch.profiler over a few steps."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """Steps, batch sizes, and how often to log, evaluate, save."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    """Checkpoint to start from, and the ones to keep."""
    run: RunConfig = field(default_factory=RunConfig)
    """Run directory."""
