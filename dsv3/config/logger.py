"""The choices of the `logger` group: where a run's numbers go besides metrics.jsonl."""

from dataclasses import dataclass, field
from enum import Enum

from dsv3.errors import require

PROJECT_FORBIDS = "/\\#?%:"

PROJECT_LENGTH = 128


class WandbMode(Enum):
    """Where wandb records; `auto` is online for a user who is logged in and offline for everybody else."""

    auto = "auto"
    offline = "offline"
    online = "online"
    disabled = "disabled"


@dataclass
class LoggerConfig:
    """The base of every logger's config."""

    _target_: str = "dsv3.metrics.loggers.NoLogger"
    _recursive_: bool = False
    _convert_: str = "object"


@dataclass
class WandbLoggerConfig(LoggerConfig):
    """Weights & Biases; `entity`, `name` and `group` of None are left to wandb and the run directory."""

    _target_: str = "dsv3.metrics.wandb.WandbLogger"
    project: str = "dsv3"
    entity: str | None = None
    name: str | None = None
    group: str | None = None
    tags: list[str] = field(default_factory=list)
    mode: WandbMode = WandbMode.auto

    def validate(self) -> None:
        """Refuse a project name that wandb would refuse later, in the middle of the launch."""
        allowed = f"a name of 1 to {PROJECT_LENGTH} characters without any of {PROJECT_FORBIDS}"
        fits = 0 < len(self.project) <= PROJECT_LENGTH and not set(self.project) & set(PROJECT_FORBIDS)
        require(fits, "project", self.project, allowed)


@dataclass
class TensorboardLoggerConfig(LoggerConfig):
    """TensorBoard event files under the run directory."""

    _target_: str = "dsv3.metrics.loggers.TensorboardLogger"


@dataclass
class ConsoleLoggerConfig(LoggerConfig):
    """The console alone."""

    _target_: str = "dsv3.metrics.loggers.ConsoleLogger"


@dataclass
class NoLoggerConfig(LoggerConfig):
    """No logger."""

    _target_: str = "dsv3.metrics.loggers.NoLogger"
