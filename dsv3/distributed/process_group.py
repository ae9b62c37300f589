"""The process group of a run: rank context, reductions over ranks, device, threads and seeds.

Every training, evaluation and generation process enters `join_process_group`, alone or as one of several
ranks.
"""

import atexit
import multiprocessing
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from dsv3.distributed.device import choose_gpu, cpu_threads
from dsv3.distributed.heartbeat import FIRST_CALL, HEARTBEAT
from dsv3.distributed.meeting import Meeting
from dsv3.distributed.signals import Stopped
from dsv3.distributed.step_waits import STEP_WAITS
from dsv3.distributed.store import rank_store, stay_on_this_node
from dsv3.distributed.torch_private import connect_to_store, set_group_timeouts, shorten_gather_name
from dsv3.distributed.watchdog import STACKS_DIR, Watchdog, enable_flight_recorder
from dsv3.errors import STOPPED, RunFailed, UserError

T = TypeVar("T")

MARGIN = 60
"""Seconds after the watchdog at which a collective times out: every rank's stacks are written first."""

PATIENT = "patient"
"""Description of groups whose collectives wait for disks, as long as any rank moves."""

_FOREVER = timedelta(days=7)

_LAZY = "TORCH_GLOO_LAZY_INIT"


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
    meeting: Meeting | None = None
    """Where the ranks wait for one another before they exchange objects; None: within the collective."""

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

    def all_gather(self, value: Tensor) -> Tensor:
        """Return every rank's `value` as [ranks, ...], on every rank; its shape and type are the same."""
        if self.world == 1:
            return value.unsqueeze(0)
        gathered = value.new_empty(self.world, *value.shape)
        dist.all_gather(list(gathered.unbind()), value.contiguous(), group=self.group)
        HEARTBEAT.beat()
        return gathered

    def broadcast_object(self, value: T, source: int = 0) -> T:
        """Return the value of rank `source`, on every rank; a rank waits for the others as in `meet`."""
        values = [value]
        if self.world > 1:
            self.meet()
            dist.broadcast_object_list(values, src=source, device=self.device, group=self.group)
            HEARTBEAT.beat()
        return values[0]

    def all_gather_object(self, value: T) -> list[T]:
        """Return every rank's value by rank, on every rank; a rank waits for the others as in `meet`."""
        values = [value]
        if self.world > 1:
            self.meet()
            values *= self.world
            dist.all_gather_object(values, value, group=self.group)
            HEARTBEAT.beat()
        return values

    def meet(self, flag: bool = False) -> bool:
        """Wait until every rank is here; return True on all of them where any has raised `flag`.

        The wait is on the CPU and has no timeout. So a rank may come after work that the others wait for,
        such as tokenizing or writing files: the watchdog lets them wait as long as that work moves.
        """
        if self.world == 1:
            return flag
        if self.meeting is not None:
            return self.meeting.meet(flag)
        return self.any(flag)

    def in_background(self) -> "RankContext":
        """Return the same ranks for a thread beside the steps, or for a library that waits for disks.

        All ranks call it together. Their group is one of gloo that never times out, and they meet apart from
        the others, so that a thread's messages never mix with a step's. Two ranks connect when they first
        have something to tell each other: all pairs of 2,048 ranks would be 2 million connections.
        """
        if self.world == 1:
            return self
        before = os.environ.get(_LAZY)
        os.environ[_LAZY] = "1"
        try:
            # Not use_local_synchronization: the group's name would follow from the number of groups that a
            # rank is in, and ranks with other numbers would wait for one another for ever.
            group = dist.new_group(timeout=_FOREVER, backend="gloo", group_desc=PATIENT)
        finally:
            os.environ.pop(_LAZY)
            if before is not None:
                os.environ[_LAZY] = before
        meeting = self.meeting and self.meeting.apart()
        return replace(self, group=group, device=torch.device("cpu"), watchdog=None, meeting=meeting)

    def limit_collectives(self, first_calls: bool) -> None:
        """Let each collective of every process group, also of those of a mesh, fail soon after the watchdog.

        Call it when groups have been made. With `first_calls` a collective may also wait for another rank's
        compilation; after the first step it may not.
        """
        if self.watchdog is not None:
            seconds = self.watchdog.timeout + MARGIN + (FIRST_CALL if first_calls else 0)
            set_group_timeouts(timedelta(seconds=seconds), besides=PATIENT)

    def watch(self, run_dir: Path) -> None:
        """Let the watchdog write the stacks of a hang to `run_dir`/stacks from now on."""
        if self.watchdog is not None:
            self.watchdog.write_to(run_dir / STACKS_DIR)

    def _reduce(self, value: Tensor, operation: dist.ReduceOp.RedOpType) -> Tensor:
        if self.world == 1:
            return value
        # NCCL takes no tensor of the host, such as a norm of offloaded gradients.
        reduced = value.to(self.device, copy=True)
        with STEP_WAITS.reduction():
            dist.all_reduce(reduced, op=operation, group=self.group)
        HEARTBEAT.beat()
        return reduced.to(value.device)


@contextmanager
def join_process_group(
    timeout: int, on_cpu: bool = False, planned_for_cpu: bool = False
) -> Iterator[RankContext]:
    """Join the process group that the environment describes, if any; leave it when all went well.

    `timeout` is the time that the ranks may be without progress, in seconds. `on_cpu` leaves the GPUs alone,
    where there are any. On CPU the ranks of a node share its cores.

    Raises:
        UserError: PyTorch finds a GPU, and the job is `planned_for_cpu` because nvidia-smi showed none.
            World, memory and kernels of the plan would not be those of the run.
    """
    world, local_world = (int(os.environ.get(name, "1")) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"))
    rank, local_rank = (int(os.environ.get(name, "0")) for name in ("RANK", "LOCAL_RANK"))
    if on_cpu or not torch.cuda.is_available():
        device = torch.device("cpu")
        torch.set_num_threads(cpu_threads(local_world, os.environ))
    elif planned_for_cpu:
        raise UserError(
            "hardware=auto asks nvidia-smi, which shows no GPU here, and PyTorch finds one: "
            "name it (hardware=h100), or take hardware=cpu"
        )
    else:
        gpu = choose_gpu(local_rank, local_world, torch.cuda.device_count(), os.environ)
        device = torch.device("cuda", gpu)
        torch.cuda.set_device(device)
    watchdog, meeting = None, None
    if world > 1:
        backend = "nccl" if device.type == "cuda" else "gloo"
        device_id = device if device.type == "cuda" else None
        limit = timedelta(seconds=timeout + MARGIN)
        enable_flight_recorder(os.environ)
        shorten_gather_name()
        if local_world == world:
            stay_on_this_node(os.environ)
        try:
            store = rank_store(rank, limit)
            where = {} if store is None else {"store": store, "rank": rank, "world_size": world}
            dist.init_process_group(backend, timeout=limit, device_id=device_id, **where)
        except RuntimeError as error:  # PyTorch's errors about stores and networks are some of these
            if multiprocessing.parent_process() is not None:
                raise  # another rank has died, and our launcher knows why
            reason = next(iter(str(error).splitlines()), type(error).__name__)[:200]
            raise RunFailed(
                f"rank {rank} did not meet the {world - 1} other{'s' if world > 2 else ''}: {reason}"
            ) from None
        store = connect_to_store("dsv3")
        watchdog = Watchdog(rank, world, timeout, store)
        # Until there is a run directory, and in tasks that have none.
        folder = f"dsv3-stacks-{os.getuid()}-{os.environ.get('MASTER_PORT', '')}"
        watchdog.start(Path(tempfile.gettempdir()) / folder, cuda=device.type == "cuda")
        meeting = Meeting(store, world, "ranks")
    ranks = RankContext(rank, local_rank, world, device, watchdog=watchdog, meeting=meeting)
    try:
        yield ranks
    except Stopped:
        # Rank 0 may still be closing its logger, and a launcher ends all ranks after the first. Under srun
        # the store is rank 0's, which must not leave before all have read that they have met.
        ranks.meet()
        if world > 1:
            dist.barrier()
            # A worker hands the stop to its launcher as a result (workers.py), other ranks exit with it.
            atexit.register(_leave, 0 if multiprocessing.parent_process() is not None else STOPPED)
        raise
    except UserError:
        # All ranks raise it alike, and the launcher has it from a file. A process of torchrun or srun is the
        # command itself, with an exit code of its own. After any other error the first to end is the culprit.
        if world > 1 and multiprocessing.parent_process() is not None:
            atexit.register(_leave, 1)
        raise
    finally:
        if watchdog is not None:
            watchdog.stop()
    # Not in a finally: a failing rank that closes its connections makes the others fail first, with an error
    # about the connection in place of the reason. The end of its process closes them anyway.
    if dist.is_initialized():
        dist.destroy_process_group()
        atexit.register(_leave, 0)


def _leave(code: int) -> None:
    """End a worker before C++ tears its threads down, which now and then aborts it."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
