"""Worker side: functions that die or raise, for tests of the pool."""

import os
import signal
from pathlib import Path

import torch.distributed as dist


def die_once(mark: Path) -> int:
    """Kill rank 1 the first time."""
    if dist.get_rank() == 1 and not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()
    return dist.get_rank()


def die() -> None:
    """Kill rank 1 every time."""
    if dist.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)


def raise_once(mark: Path) -> None:
    """Raise on rank 1 the first time."""
    if dist.get_rank() == 1 and not mark.exists():
        mark.touch()
        raise ValueError("as asked")
