"""What convert.py can be told."""

from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from dsv3.checkpoint.sizes import parse_size
from dsv3.model.config import ModelConfig
from dsv3.runtime.errors import require

AUTO = "auto"


class Direction(Enum):
    """What convert.py does."""

    download = "download"
    hf_to_dcp = "hf_to_dcp"
    dcp_to_hf = "dcp_to_hf"
    hf_to_hf = "hf_to_hf"


class Assets(Enum):
    """Which files of a repository are fetched."""

    tokenizer = "tokenizer"
    config = "config"
    weights = "weights"


class StoredType(Enum):
    """What weights are stored as; fp8 is E4M3 in blocks with a scale each, as DeepSeek released them."""

    bf16 = "bf16"
    fp32 = "fp32"
    fp8 = "fp8"


class ScaleFormat(Enum):
    """What new fp8 scales are: any fp32 number, or powers of two, as in DeepSeek-V3.1."""

    float32 = "float32"
    ue8m0 = "ue8m0"


@dataclass
class ConvertConfig:
    """What convert.py is told.

    `input` and `output` are directories. `workers` threads compute (`auto`: one a core). `verify` reads the
    finished output again and compares its digests. `scale_fmt` null is that of the input's scales. `plan`
    only tells time and memory, at `speeds` of the disk in GB/s. `repo`, `revision` and `assets` are
    for direction=download.
    """

    direction: Direction
    input: str | None = None
    output: str | None = None
    dtype: StoredType = StoredType.bf16
    scale_fmt: ScaleFormat | None = None
    max_shard_size: str = "5GB"
    workers: Any = AUTO
    verify: bool = False
    plan: bool = False
    speeds: list[float] = field(default_factory=lambda: [0.5, 1.0, 3.0, 7.0])
    repo: str | None = None
    revision: str | None = None
    assets: Assets = Assets.config
    model: ModelConfig | None = None

    def validate(self) -> None:
        downloads = self.direction is Direction.download
        if downloads:
            require(bool(self.repo), "repo", self.repo, "give a repository of the hub, repo=OWNER/NAME")
        else:
            require(bool(self.input), "input", self.input, "give the directory to read, input=DIR")
        require(bool(self.output) or self.plan, "output", self.output, "give a directory, output=DIR")
        fp8_to_dcp = self.direction is Direction.hf_to_dcp and self.dtype is StoredType.fp8
        require(not fp8_to_dcp, "dtype", self.dtype.value, "a DCP is trained from: it takes bf16 or fp32")
        is_count = type(self.workers) is int and self.workers > 0
        require(is_count or self.workers == AUTO, "workers", self.workers, "must be auto or above 0")
        positive = all(speed > 0 for speed in self.speeds)
        require(positive and bool(self.speeds), "speeds", self.speeds, "must be GB/s, each above 0")
        parse_size(self.max_shard_size)
