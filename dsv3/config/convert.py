"""Sizes of files as people write them.

What convert.py can be told.
"""

import re
from dataclasses import dataclass, field
from enum import Enum
from fractions import Fraction
from typing import Any

from dsv3.config.model import ModelConfig
from dsv3.errors import InvalidValue, nearest, require

UNITS = {"B": 1} | {
    f"{prefix}{'i' * binary}B": (1024 if binary else 1000) ** power
    for power, prefix in enumerate("KMGT", start=1)
    for binary in (False, True)
}
"""Bytes by unit: 1 GB is 1000^3 and 1 GiB is 1024^3, as on the hub."""

_SIZE = re.compile(r"\s*([0-9]{1,20}(?:\.[0-9]{1,20})?)\s*([A-Za-z]*)\s*", re.ASCII)


def parse_size(value: str | int, key: str = "max_shard_size") -> int:
    """Bytes of `5GB`, `2.5 GiB` or a plain number; InvalidValue for `key` where it is no size above 0.

    huggingface_hub keeps its own to itself, and that one knows no GiB and no plain numbers.
    """
    found = _SIZE.fullmatch(str(value))
    factors = {unit.lower(): factor for unit, factor in UNITS.items()} | {"": 1}
    if found is None or found[2].lower() not in factors:
        hint = _hint(found[1], found[2]) if found else ""
        raise InvalidValue(key, value, f"must be bytes, or a number with one of {', '.join(UNITS)}.{hint}")
    size = Fraction(found[1]) * factors[found[2].lower()]
    if size < 1 or size.denominator > 1:
        raise InvalidValue(key, value, "must be a whole number of bytes above 0")
    return int(size)


def _hint(number: str, unit: str) -> str:
    close = nearest(unit, UNITS) or nearest(f"{unit.upper()}B", UNITS)
    return close.replace("'", f"'{number}", 1)


AUTO = "auto"

_MOST = 1024
"""Workers; each has buffers."""


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
    finished output again and compares its digests; one that is finished already is not written anew.
    `scale_fmt` null is that of the input's scales. `plan` only tells time and memory, at `speeds` of the
    disk in GB/s; without an `input` those of a release of `model`. `repo`, `revision` and `assets` are
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
            for key in ("plan", "verify"):
                require(not getattr(self, key), key, True, "direction=download has none")
        require(bool(self.output) or self.plan, "output", self.output, "give a directory, output=DIR")
        fp8_to_dcp = self.direction is Direction.hf_to_dcp and self.dtype is StoredType.fp8
        require(not fp8_to_dcp, "dtype", self.dtype.value, "a DCP is trained from: it takes bf16 or fp32")
        is_count = type(self.workers) is int and 0 < self.workers <= _MOST
        allowed = f"must be auto or a number from 1 to {_MOST}"
        require(is_count or self.workers == AUTO, "workers", self.workers, allowed)
        positive = all(speed > 0 for speed in self.speeds)
        require(positive and bool(self.speeds), "speeds", self.speeds, "must be GB/s, each above 0")
        parse_size(self.max_shard_size)
