"""train.deterministic: the same seed gives the same bits.

One worker's place in the world: rank, device and the reductions the training step asks for.
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
from dsv3.distributed.torch_private import gather_under_a_short_name
from dsv3.distributed.watchdog import Watchdog, record_collectives


def make_deterministic(enabled: bool, seed: int) -> None:
    """Seed the global generators; when `enabled`, let PyTorch refuse what is not deterministic."""
    torch.manual_seed(seed)
    if enabled:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False


T = TypeVar("T")

# Seconds by which a collective gives up later than the watchdog, which writes every rank's stack first.
_MARGIN = 60


@dataclass(frozen=True)
class RankContext:
    """This process among `world` of them; without a process group it is alone.

    `data` is which share of a step's rows it reads, of how many (None: every rank another one).
    `loss_replicas` ranks compute the same loss. `group` null is all processes.
    """

    rank: int
    local_rank: int
    world: int
    device: torch.device
    data: tuple[int, int] | None = None
    loss_replicas: int = 1
    group: dist.ProcessGroup | None = None
    watchdog: Watchdog | None = None

    @property
    def data_rank(self) -> int:
        """Which share of the rows this rank reads."""
        return self.data[0] if self.data else self.rank

    @property
    def data_world(self) -> int:
        """How many shares there are."""
        return self.data[1] if self.data else self.world

    @property
    def row_replicas(self) -> int:
        """Ranks that read the same rows."""
        return self.world // self.data_world

    @property
    def is_main(self) -> bool:
        """Whether this rank writes files and speaks to the user."""
        return self.rank == 0

    def sum(self, value: Tensor) -> Tensor:
        """`value` added up over all ranks; every rank gets the sum."""
        return self._reduce(value, dist.ReduceOp.SUM)

    def max(self, value: Tensor) -> Tensor:
        """The largest `value` of any rank, element by element."""
        return self._reduce(value, dist.ReduceOp.MAX)

    def any(self, flag: bool) -> bool:
        """Whether any rank says so: all ranks get one answer."""
        if self.world == 1:
            return flag
        return bool(self.max(torch.tensor(float(flag), device=self.device)).item())

    def broadcast_object(self, value: T) -> T:
        """Rank 0's value, on every rank."""
        values = [value]
        if self.world > 1:
            dist.broadcast_object_list(values, src=0, device=self.device, group=self.group)
            self._beat()
        return values[0]

    def all_gather_object(self, value: T) -> list[T]:
        """Every rank's value, in the order of the ranks, on every rank."""
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
        """From now on a rank that waits too long ends the run, with all stacks in `run_dir`/stacks."""
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
    """Threads of a rank on CPU: its share of the cores; one process alone does what OMP_NUM_THREADS says.

    Where several jobs of a sweep run at a time, joblib sets it: two threads of each on two cores would wait
    for one another at every operation. torchrun sets it to 1 for several ranks, whatever there is.
    """
    asked = os.environ.get("OMP_NUM_THREADS", "")
    if local_world == 1 and asked.isdigit() and int(asked) > 0:
        return int(asked)
    return max(1, len(os.sched_getaffinity(0)) // local_world)


@contextmanager
def join_process_group(timeout: int) -> Iterator[RankContext]:
    """Join the process group that the environment describes, if any, and leave it when all went well.

    `timeout` is what a rank may wait, in seconds. On CPU the ranks of a node share its cores.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    rank, local_rank = int(os.environ.get("RANK", "0")), int(os.environ.get("LOCAL_RANK", "0"))
    device = _device(local_rank)
    if device.type == "cpu":
        torch.set_num_threads(_threads(int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))
    if world > 1:
        backend = "nccl" if device.type == "cuda" else "gloo"
        device_id = device if device.type == "cuda" else None
        limit = timedelta(seconds=timeout + _MARGIN)
        record_collectives(os.environ)
        gather_under_a_short_name()
        dist.init_process_group(backend, timeout=limit, device_id=device_id)
    watchdog = Watchdog(rank, world, timeout) if world > 1 else None
    try:
        yield RankContext(rank, local_rank, world, device, watchdog=watchdog)
    except Stopped:
        if dist.is_initialized():
            dist.barrier()  # rank 0 may be closing its logger yet, and a launcher ends all after the first
        raise
    finally:
        if watchdog is not None:
            watchdog.stop()
    # Not in a finally: a failing rank that closed its connections would make the others fail first,
    # with a complaint about the connection in place of the reason. Its process ends them anyway.
    if dist.is_initialized():
        dist.destroy_process_group()
        atexit.register(_leave)


def _leave() -> None:
    """End a worker that is done before C++ tears its threads down, which now and then aborts it."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def _device(local_rank: int) -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    return device
