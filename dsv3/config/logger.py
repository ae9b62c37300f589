"""Schemas of the `logger` group: the recipients of a run's metrics besides metrics.jsonl."""

from dataclasses import dataclass, field
from enum import Enum

from dsv3.config.registry import Buildable, schema
from dsv3.errors import require

PROJECT_FORBIDS = "/\\#?%:"

PROJECT_LENGTH = 128


class WandbMode(Enum):
    """The mode of wandb; `auto` is online for a user who is logged in and offline for everybody else."""

    auto = "auto"
    offline = "offline"
    online = "online"
    disabled = "disabled"


@dataclass
class LoggerConfig(Buildable):
    """The base of every logger's config."""

    _target_: str = "dsv3.metrics.loggers.NoLogger"


@schema("logger/wandb")
@dataclass
class WandbLoggerConfig(LoggerConfig):
    """Weights & Biases."""

    _target_: str = "dsv3.metrics.wandb.WandbLogger"
    project: str = "dsv3"
    """Project of wandb."""
    entity: str | None = None
    """User or team of wandb; null is the user's own."""
    name: str | None = None
    """Name of the run; null is the last two folders of the run directory."""
    group: str | None = None
    """Group of runs in wandb; null is none."""
    tags: list[str] = field(default_factory=list)
    """Tags of the run."""
    mode: WandbMode = WandbMode.auto
    """Mode of wandb; auto is online for a user who is logged in and offline for everybody else."""

    def validate(self) -> None:
        """Raise InvalidValue for a project name that wandb would refuse in the middle of the launch."""
        allowed = f"a name of 1 to {PROJECT_LENGTH} characters without any of {PROJECT_FORBIDS}"
        fits = 0 < len(self.project) <= PROJECT_LENGTH and not set(self.project) & set(PROJECT_FORBIDS)
        require(fits, "project", self.project, allowed)


@schema("logger/tensorboard")
@dataclass
class TensorboardLoggerConfig(LoggerConfig):
    """TensorBoard event files under the run directory."""

    _target_: str = "dsv3.metrics.loggers.TensorboardLogger"


@schema("logger/console")
@dataclass
class ConsoleLoggerConfig(LoggerConfig):
    """The console alone."""

    _target_: str = "dsv3.metrics.loggers.ConsoleLogger"


@schema("logger/none")
@dataclass
class NoLoggerConfig(LoggerConfig):
    """No logger."""

    _target_: str = "dsv3.metrics.loggers.NoLogger"
