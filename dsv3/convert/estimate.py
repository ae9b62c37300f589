"""What a conversion would take, by arithmetic: bytes, time at given disk speeds, memory."""

from collections.abc import Sequence

from dsv3.convert.engine import MAKERS
from dsv3.convert.pieces import PIECE

_PYTORCH = 300 * 2**20


def peak_memory(workers: int) -> int:
    """Bytes of the process: PyTorch, the buffers of pieces under way, and what each maker reads into."""
    lanes = -(-workers // MAKERS)
    makers = -(-workers // lanes)
    return _PYTORCH + lanes * ((makers + 1) * PIECE + makers * 2 * PIECE)


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
