"""What the simulated GPU notes down: host waits, kernel launches, choices of kernels, and memory.

A host wait is an operator after which the host has waited for all queued work of the GPU. It is noted by the
innermost line of dsv3 that asked: file, function and kind, which stay the same when lines move.
"""

import sys
import weakref
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

PACKAGE = str(Path(__file__).resolve().parents[2] / "dsv3") + "/"
HELPER = "/model/transfers.py"
"""Its functions copy for whoever calls them."""

ALLOCATION = 512
"""CUDA's caching allocator rounds blocks up to a multiple of so many bytes."""


@dataclass
class Ledger:
    """Counts since the last `clear`."""

    waits: Counter[str] = field(default_factory=Counter)
    """Host waits by place and kind, such as "model/router.py Router.forward: item"."""
    launches: Counter[str] = field(default_factory=Counter)
    """Kernel launches by operator, views and allocations left out."""
    kernels: Counter[str] = field(default_factory=Counter)
    """Attention kernels that PyTorch would choose, by backend and head dims."""

    def wait(self, kind: str, times: int = 1) -> None:
        """Note that the host waits."""
        self.waits[f"{asker()}: {kind}"] += times

    def clear(self) -> None:
        """Forget all counts."""
        self.restore((Counter(), Counter(), Counter()))

    def snapshot(self) -> tuple[Counter[str], ...]:
        """Return copies of the counts."""
        return self.waits.copy(), self.launches.copy(), self.kernels.copy()

    def restore(self, counts: tuple[Counter[str], ...]) -> None:
        """Take the counts of a `snapshot` again."""
        self.waits, self.launches, self.kernels = counts


class Memory:
    """Bytes that the simulated GPU holds, as the caching allocator counts them."""

    def __init__(self) -> None:
        self.now = 0
        self.peak = 0
        self._known: dict[int, int] = {}

    def add(self, storage: torch.UntypedStorage) -> None:
        """Count a storage until it is freed."""
        address = storage.data_ptr()
        if not address or address in self._known:
            return
        size = -(-storage.nbytes() // ALLOCATION) * ALLOCATION
        self._known[address] = size
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._free, address, size)

    def _free(self, address: int, size: int) -> None:
        self._known.pop(address, None)
        self.now -= size


def asker() -> str:
    """Return the innermost function of dsv3 that is running, "autograd" for the engine's own operators."""
    frame: Any = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        if code.co_filename.startswith(PACKAGE) and not code.co_filename.endswith(HELPER):
            return f"{code.co_filename.removeprefix(PACKAGE)} {code.co_qualname.replace('.<locals>', '')}"
        frame = frame.f_back
    return "autograd"


LEDGER = Ledger()
MEMORY = Memory()
