"""What workers may do wrong; runs in the workers."""

import os
import signal
from pathlib import Path

import torch.distributed as dist


def die_once(mark: Path) -> int:
    """Rank 1 is killed the first time."""
    if dist.get_rank() == 1 and not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()
    return dist.get_rank()


def die() -> None:
    """Rank 1 is killed whenever it is asked."""
    if dist.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)


def raise_once(mark: Path) -> None:
    """Rank 1 raises the first time."""
    if dist.get_rank() == 1 and not mark.exists():
        mark.touch()
        raise ValueError("as asked")
