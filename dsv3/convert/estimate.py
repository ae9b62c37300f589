"""What a conversion would take, by arithmetic: bytes, time at given disk speeds, memory."""

import math
from collections.abc import Sequence

from dsv3.config.convert import ConvertConfig, Direction, StoredType
from dsv3.config.model import ModelConfig
from dsv3.convert.engine import LANES
from dsv3.convert.output_file import PIECE
from dsv3.hf.config_json import BLOCK
from dsv3.hf.names import HFTensor, is_quantized, mtp_duplicates, released_layout

_PYTORCH = 300 * 2**20


def peak_memory(workers: int) -> int:
    """Bytes of the process: PyTorch, the buffers of pieces under way, and what each maker reads into."""
    lanes = min(workers, LANES)
    makers = -(-workers // lanes)
    return _PYTORCH + lanes * ((makers + 1) * PIECE + makers * 2 * PIECE)


def foreseen(
    config: ConvertConfig, model: ModelConfig, shapes: dict[str, tuple[int, ...]]
) -> tuple[int, int]:
    """Bytes that are read and written where there is no input yet: a release is taken to be in fp8."""
    layout = released_layout(model, shapes)
    by_name = {tensor.name: tensor for tensor in layout}
    released = layout + [by_name[name] for name in mtp_duplicates(model).values()]
    other = StoredType.bf16 if config.dtype is StoredType.fp8 else StoredType.fp8
    tensors, stored = {
        Direction.hf_to_dcp: (layout, StoredType.fp8),
        Direction.dcp_to_hf: (released, StoredType.bf16),
        Direction.hf_to_hf: (released, other),
    }[config.direction]
    read = layout if config.direction is Direction.dcp_to_hf else released
    return _nbytes(read, stored), _nbytes(tensors, config.dtype)


def _nbytes(tensors: Sequence[HFTensor], dtype: StoredType) -> int:
    """Bytes of tensors with their scales, a number in fp32 for each block."""
    total = 0
    for tensor in tensors:
        count = math.prod(tensor.shape)
        if dtype is StoredType.fp8 and is_quantized(tensor.name):
            total += count + 4 * math.prod(-(-length // BLOCK) for length in tensor.shape)
        else:
            total += count * (4 if dtype is StoredType.fp32 else 2)
    return total


def estimate(read: int, written: int, workers: int, speeds: Sequence[float]) -> str:
    """The table that plan=true prints; speeds are GB/s of the disk."""
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
