"""The process group of a run: rank context, reductions over ranks, device, threads and seeds.

Every training, evaluation and generation process enters `join_process_group`, alone or as one of several
ranks.
"""

import atexit
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from dsv3.distributed.signals import Stopped
from dsv3.distributed.torch_private import shorten_gather_name
from dsv3.distributed.watchdog import Watchdog, enable_flight_recorder

T = TypeVar("T")

# A collective times out so many seconds after the watchdog, which must write every rank's stack first.
_MARGIN = 60


def make_deterministic(enabled: bool, seed: int) -> None:
    """Seed the global generators; when `enabled`, make PyTorch refuse nondeterministic operations."""
    torch.manual_seed(seed)
    if enabled:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False


@dataclass(frozen=True)
class RankContext:
    """This process among `world` ranks; without a process group it is alone."""

    rank: int
    local_rank: int
    world: int
    device: torch.device
    data: tuple[int, int] | None = None
    """(share, shares): the share of a step's rows that this rank reads; None: every rank another one."""
    loss_replicas: int = 1
    """Ranks that compute the same loss."""
    group: dist.ProcessGroup | None = None
    """Process group of the reductions; None is all processes."""
    watchdog: Watchdog | None = None

    @property
    def data_rank(self) -> int:
        """Return the number of the share of the rows that this rank reads."""
        return self.data[0] if self.data else self.rank

    @property
    def data_world(self) -> int:
        """Return the number of shares of the rows."""
        return self.data[1] if self.data else self.world

    @property
    def row_replicas(self) -> int:
        """Return the number of ranks that read the same rows."""
        return self.world // self.data_world

    @property
    def is_main(self) -> bool:
        """Return True on the rank that writes files and speaks to the user."""
        return self.rank == 0

    def sum(self, value: Tensor) -> Tensor:
        """Return `value` summed over all ranks, on every rank."""
        return self._reduce(value, dist.ReduceOp.SUM)

    def max(self, value: Tensor) -> Tensor:
        """Return the elementwise maximum of `value` over all ranks, on every rank."""
        return self._reduce(value, dist.ReduceOp.MAX)

    def any(self, flag: bool) -> bool:
        """Return True on every rank where `flag` is true on any."""
        if self.world == 1:
            return flag
        return bool(self.max(torch.tensor(float(flag), device=self.device)).item())

    def broadcast_object(self, value: T) -> T:
        """Return rank 0's value, on every rank."""
        values = [value]
        if self.world > 1:
            dist.broadcast_object_list(values, src=0, device=self.device, group=self.group)
            self._beat()
        return values[0]

    def all_gather_object(self, value: T) -> list[T]:
        """Return every rank's value in rank order, on every rank."""
        values = [value]
        if self.world > 1:
            values *= self.world
            dist.all_gather_object(values, value, group=self.group)
            self._beat()
        return values

    def barrier(self) -> None:
        """Wait until every rank is here."""
        if self.world > 1:
            dist.barrier(group=self.group)
            self._beat()

    def watch(self, run_dir: Path) -> None:
        """Start the watchdog: a rank that waits too long ends the run; all stacks go to `run_dir`/stacks."""
        if self.watchdog is not None:
            self.watchdog.start(run_dir / "stacks", cuda=self.device.type == "cuda")

    def _beat(self) -> None:
        if self.watchdog is not None:
            self.watchdog.beat()

    def _reduce(self, value: Tensor, operation: dist.ReduceOp.RedOpType) -> Tensor:
        if self.world > 1:
            value = value.clone()
            dist.all_reduce(value, op=operation, group=self.group)
            self._beat()
        return value


def _threads(local_world: int) -> int:
    """Return the threads of a rank on CPU: its share of the cores; for one process alone OMP_NUM_THREADS.

    joblib sets the variable where several jobs of a sweep run at a time: two threads of each on two cores
    would wait for one another at every operation. torchrun sets it to 1 for several ranks, however many cores
    there are.
    """
    asked = os.environ.get("OMP_NUM_THREADS", "")
    if local_world == 1 and asked.isdigit() and int(asked) > 0:
        return int(asked)
    return max(1, len(os.sched_getaffinity(0)) // local_world)


@contextmanager
def join_process_group(timeout: int, on_cpu: bool = False) -> Iterator[RankContext]:
    """Join the process group that the environment describes, if any; leave it when all went well.

    `timeout` is the time that a rank may wait, in seconds. `on_cpu` leaves the GPUs alone, where there are
    any. On CPU the ranks of a node share its cores.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    rank, local_rank = int(os.environ.get("RANK", "0")), int(os.environ.get("LOCAL_RANK", "0"))
    has_gpu = not on_cpu and torch.cuda.is_available()
    device = torch.device("cuda", local_rank) if has_gpu else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if device.type == "cpu":
        torch.set_num_threads(_threads(int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))
    if world > 1:
        backend = "nccl" if device.type == "cuda" else "gloo"
        device_id = device if device.type == "cuda" else None
        limit = timedelta(seconds=timeout + _MARGIN)
        enable_flight_recorder(os.environ)
        shorten_gather_name()
        dist.init_process_group(backend, timeout=limit, device_id=device_id)
    watchdog = Watchdog(rank, world, timeout) if world > 1 else None
    try:
        yield RankContext(rank, local_rank, world, device, watchdog=watchdog)
    except Stopped:
        if dist.is_initialized():
            # Rank 0 may still be closing its logger, and a launcher ends all ranks after the first.
            dist.barrier()
        raise
    finally:
        if watchdog is not None:
            watchdog.stop()
    # Not in a finally: a failing rank that closes its connections makes the others fail first, with an error
    # about the connection in place of the reason. The end of its process closes them anyway.
    if dist.is_initialized():
        dist.destroy_process_group()
        atexit.register(_leave)


def _leave() -> None:
    """End a finished worker before C++ tears its threads down, which now and then aborts it."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
