"""Which checkpoint a command reads and which ones a run keeps."""

from dataclasses import dataclass
from enum import Enum

from dsv3.model.config import ModelConfig
from dsv3.runtime.errors import require


@dataclass
class CheckpointConfig:
    """`load` is a run, step or DCP directory, of which a training run takes the weights only.

    `keep_last` complete checkpoints stay; older ones are removed once a newer one is committed.
    """

    load: str | None = None
    keep_last: int = 2

    def validate(self) -> None:
        require(self.keep_last >= 1, "keep_last", self.keep_last, "must be at least 1")


@dataclass
class HFModelConfig(ModelConfig):
    """model=hf: a model whose numbers are still in the config.json of the checkpoint at `path`.

    runtime/prepare.py puts a plain ModelConfig in its place.
    """

    path: str | None = None


class Direction(Enum):
    """What convert.py does."""

    download = "download"


class Assets(Enum):
    """Which files of a repository are fetched."""

    tokenizer = "tokenizer"
    config = "config"
    weights = "weights"


@dataclass
class ConvertConfig:
    """What convert.py is told: which files of the hub's `repo` (at `revision`) go to `output`."""

    direction: Direction
    repo: str | None = None
    revision: str | None = None
    assets: Assets = Assets.config
    output: str | None = None

    def validate(self) -> None:
        require(bool(self.repo), "repo", self.repo, "give a repository of the hub, repo=OWNER/NAME")
        require(bool(self.output), "output", self.output, "give a directory, output=DIR")
