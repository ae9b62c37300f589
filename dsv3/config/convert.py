"""Schema of convert.py, and file sizes as people write them.

`max_shard_size` is read by our own `parse_size`: huggingface_hub keeps its parser private, and that parser
knows no GiB and no plain numbers.
"""

import re
from dataclasses import dataclass, field
from enum import Enum
from fractions import Fraction

from dsv3.config.model import ModelConfig
from dsv3.config.registry import PATH, schema
from dsv3.errors import InvalidValue, did_you_mean, require

AUTO = "auto"

_MOST = 1024
"""Largest number of workers; each has buffers."""

UNITS = {"B": 1} | {
    f"{prefix}{'i' * binary}B": (1024 if binary else 1000) ** power
    for power, prefix in enumerate("KMGT", start=1)
    for binary in (False, True)
}
"""Bytes per unit: 1 GB is 1000^3 and 1 GiB is 1024^3, as on the hub."""

_SIZE = re.compile(r"\s*([0-9]{1,20}(?:\.[0-9]{1,20})?)\s*([A-Za-z]*)\s*", re.ASCII)


def parse_size(value: str | int, key: str = "max_shard_size") -> int:
    """Return the bytes of `5GB`, `2.5 GiB` or a plain number; raise InvalidValue for `key` otherwise."""
    found = _SIZE.fullmatch(str(value))
    factors = {unit.lower(): factor for unit, factor in UNITS.items()} | {"": 1}
    if found is None or found[2].lower() not in factors:
        hint = ""
        if found is not None:
            number, unit = found[1], found[2]
            close = did_you_mean(unit, UNITS) or did_you_mean(f"{unit.upper()}B", UNITS)
            hint = close.replace("'", f"'{number}", 1)
        raise InvalidValue(key, value, f"must be bytes, or a number with one of {', '.join(UNITS)}.{hint}")
    size = Fraction(found[1]) * factors[found[2].lower()]
    if size < 1 or size.denominator > 1:
        raise InvalidValue(key, value, "must be a whole number of bytes above 0")
    return int(size)


class Direction(Enum):
    """The conversions of convert.py."""

    download = "download"
    hf_to_dcp = "hf_to_dcp"
    dcp_to_hf = "dcp_to_hf"
    hf_to_hf = "hf_to_hf"


_EVERY = frozenset({"direction", "output"})

_CONVERSION = _EVERY | {"input", "dtype", "workers", "verify", "plan", "speeds", "model"}

_TO_HF = _CONVERSION | {"scale_fmt", "fp8", "max_shard_size"}

READS = {
    Direction.download: _EVERY | {"repo", "revision", "assets"},
    Direction.hf_to_dcp: _CONVERSION,
    Direction.dcp_to_hf: _TO_HF,
    Direction.hf_to_hf: _TO_HF,
}
"""The keys and nodes that each direction reads; others are refused when they are typed."""


class Assets(Enum):
    """The files of a repository that direction=download fetches."""

    tokenizer = "tokenizer"
    config = "config"
    weights = "weights"
    all = "all"


class StoredType(Enum):
    """The stored type of weights; fp8 is E4M3 in blocks with a scale each, as DeepSeek released them."""

    bf16 = "bf16"
    fp32 = "fp32"
    fp8 = "fp8"


class ScaleFormat(Enum):
    """The format of new fp8 scales: any fp32 number, or powers of two as in DeepSeek-V3.1."""

    float32 = "float32"
    ue8m0 = "ue8m0"


class Unaligned(Enum):
    """The stored type, in an fp8 export, of weights with a side that is no multiple of a block's."""

    fp8 = "fp8"
    bf16 = "bf16"


@dataclass
class Fp8ExportConfig:
    """The choice of weights that an export with dtype=fp8 writes in fp8."""

    unaligned: Unaligned = Unaligned.fp8
    """Stored type of weights with sides that are no multiples of a block; every reader reads bf16 alike."""


@schema("convert")
@dataclass
class ConvertConfig:
    """One conversion of convert.py.

    `repo`, `revision` and `assets` are for direction=download.
    """

    direction: Direction
    """The conversion."""
    input: str | None = field(default=None, metadata=PATH)
    """Directory to read; with plan=true null stands for a release of `model`."""
    output: str | None = field(default=None, metadata=PATH)
    """Directory to write; must be empty, missing or an unfinished output of the same command."""
    dtype: StoredType = StoredType.bf16
    """Stored type of the output's weights; a DCP takes bf16 or fp32."""
    scale_fmt: ScaleFormat | None = None
    """Format of new fp8 scales; null is that of the input's scales."""
    fp8: Fp8ExportConfig = field(default_factory=Fp8ExportConfig)
    """The weights that dtype=fp8 writes in fp8."""
    max_shard_size: str = "5GB"
    """Largest safetensors file: 5GB, 500MiB, or a number of bytes."""
    workers: int | str = AUTO
    """Threads that compute; auto is one per core."""
    verify: bool = False
    """Read the finished output again and compare its digests; a complete one is not written anew."""
    plan: bool = False
    """Print bytes, time and memory only."""
    speeds: list[float] = field(default_factory=lambda: [0.5, 1.0, 3.0, 7.0])
    """Disk speeds that `plan` assumes, in GB/s."""
    repo: str | None = None
    """Repository of the HuggingFace hub, OWNER/NAME or the address of its page."""
    revision: str | None = None
    """Branch, tag or commit of the repository; null is its default branch."""
    assets: Assets = Assets.config
    """Files to fetch; weights come with the config, all is the whole repository."""
    model: ModelConfig | None = None
    """The model; model=hf takes it from the input's config.json."""

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
