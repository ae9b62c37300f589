"""Estimate a conversion by arithmetic: bytes, time at given disk speeds, memory."""

import math
from collections.abc import Sequence

from dsv3.config.convert import ConvertConfig, Direction, StoredType, Unaligned
from dsv3.config.model import ModelConfig
from dsv3.convert.engine import count_threads
from dsv3.convert.fp8_choice import Fp8Choice
from dsv3.convert.output_file import SLICE_BYTES
from dsv3.hf.names import HFTensor, hf_layout, with_mtp_duplicates
from dsv3.planning.sharding import FP8_BLOCK

_PYTORCH_BYTES = 300 * 2**20


def peak_memory(workers: int) -> int:
    """Return the bytes of the process: PyTorch, and the buffers of slices and loaders."""
    files, loaders = count_threads(workers)
    return _PYTORCH_BYTES + files * ((loaders + 1) * SLICE_BYTES + loaders * 2 * SLICE_BYTES)


def estimated_bytes(
    config: ConvertConfig, model: ModelConfig, shapes: dict[str, tuple[int, ...]]
) -> tuple[int, int]:
    """Return the bytes read and written where there is no input yet.

    An HF checkpoint is assumed to be in fp8.
    """
    layout = hf_layout(model, shapes)
    with_duplicates = [tensor for _, tensor in with_mtp_duplicates(layout, model)]
    other = StoredType.bf16 if config.dtype is StoredType.fp8 else StoredType.fp8
    tensors, stored = {
        Direction.hf_to_dcp: (layout, StoredType.fp8),
        Direction.dcp_to_hf: (with_duplicates, StoredType.bf16),
        Direction.hf_to_hf: (with_duplicates, other),
    }[config.direction]
    read = layout if config.direction is Direction.dcp_to_hf else with_duplicates
    return _nbytes(read, stored, Unaligned.fp8), _nbytes(tensors, config.dtype, config.fp8.unaligned)


def _nbytes(tensors: Sequence[HFTensor], dtype: StoredType, unaligned: Unaligned) -> int:
    """Return the bytes of tensors with their scales, one fp32 value per block."""
    fp8: frozenset[str] = frozenset()
    if dtype is StoredType.fp8:
        fp8 = Fp8Choice.of(tensors, (FP8_BLOCK, FP8_BLOCK), unaligned).names
    total = 0
    for tensor in tensors:
        count = math.prod(tensor.shape)
        if tensor.name in fp8:
            total += count + 4 * math.prod(-(-length // FP8_BLOCK) for length in tensor.shape)
        else:
            total += count * (4 if dtype is StoredType.fp32 else 2)
    return total


def estimate(read: int, written: int, workers: int, speeds: Sequence[float]) -> str:
    """Return the table that plan=true prints; `speeds` are GB/s of the disk."""
    lines = [
        f"reads {read / 1e9:,.2f} GB, writes {written / 1e9:,.2f} GB, "
        f"memory at most about {peak_memory(workers) / 2**30:.2f} GiB with workers={workers}",
        "disk GB/s   one disk for both   a disk each",
    ]
    for speed in speeds:
        both, longer = (read + written) / speed / 1e9, max(read, written) / speed / 1e9
        lines.append(f"{speed:9.2f}   {_time(both):>17}   {_time(longer):>11}")
    return "\n".join(lines)


def _time(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"
