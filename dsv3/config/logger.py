"""Schemas of the `logger` group: the recipients of a run's metrics besides metrics.jsonl."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import Enum
from typing import Self

from dsv3.config.registry import Buildable, schema
from dsv3.errors import require

PROJECT_FORBIDS = "/\\#?%:"

PROJECT_LENGTH = 128

NAME_LENGTH, TAG_LENGTH = 128, 64
"""Most characters of a name, and of a tag, that wandb takes."""


class WandbMode(Enum):
    """The mode of wandb; `auto` is online for a user who is logged in and offline for everybody else."""

    auto = "auto"
    offline = "offline"
    online = "online"
    disabled = "disabled"


@dataclass(frozen=True)
class RunOrigin:
    """The origin of a run, for a logger that names, groups and tags it."""

    command: str
    """As it was typed, without the program."""
    choices: Sequence[str] = ()
    """Names of the model, the layout, the precision and the experiment."""
    sweep: str | None = None
    """Name of the directory of the sweep that the run is a job of."""
    differs: str = ""
    """Overrides that set the job apart from the others of its sweep, `lr=1e-3 top_k=2`."""


@dataclass
class LoggerConfig(Buildable):
    """The base of every logger's config."""

    _target_: str = "dsv3.metrics.loggers.NoLogger"

    def filled_in(self, origin: RunOrigin) -> Self:
        """Return the config with the null values that follow from the run's origin."""
        return self


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
    """Name of the run; null is what differs in a sweep, else the last two folders of the run directory."""
    group: str | None = None
    """Group of runs in wandb; null is the directory's name in a sweep, else none."""
    job_type: str | None = None
    """Type of the run in wandb; null is sweep in a sweep, else train."""
    tags: list[str] | None = None
    """Tags of the run; null is the names of model, layout, precision and experiment."""
    notes: str | None = None
    """Notes of the run; null is the command as it was typed."""
    mode: WandbMode = WandbMode.auto
    """Mode of wandb; auto is online for a user who is logged in and offline for everybody else."""

    def validate(self) -> None:
        """Raise InvalidValue for a project name that wandb would refuse in the middle of the launch."""
        allowed = f"a name of 1 to {PROJECT_LENGTH} characters without any of {PROJECT_FORBIDS}"
        fits = 0 < len(self.project) <= PROJECT_LENGTH and not set(self.project) & set(PROJECT_FORBIDS)
        require(fits, "project", self.project, allowed)

    def filled_in(self, origin: RunOrigin) -> Self:
        """Return the config with name, group, type, tags and notes after the run's origin."""
        return replace(
            self,
            name=self.name or origin.differs[:NAME_LENGTH] or None,
            group=self.group or (origin.sweep and origin.sweep[:NAME_LENGTH]),
            job_type=self.job_type or ("sweep" if origin.sweep else "train"),
            tags=[choice[:TAG_LENGTH] for choice in origin.choices] if self.tags is None else self.tags,
            notes=self.notes if self.notes is not None else origin.command,
        )


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
