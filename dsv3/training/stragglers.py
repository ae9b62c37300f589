"""Find the rank that the others wait for: its share of a step's time, and what slows it.

Every train.log_every steps ranks exchange four numbers each: how long they waited for others, for their data,
how long a step took and, on GPUs, how long a fixed matmul took that needs no other rank. The slowest rank is
the one that waits less than its peers, and its share is by how much, of a step's time: so much shorter would
a step be if it were as fast as they are. docs/reliability.md says what is seen on CPU and on GPUs.
"""

import socket
from collections import Counter
from collections.abc import Sequence
from statistics import median, median_high, median_low
from typing import NamedTuple

import torch

from dsv3.distributed.process_group import RankContext
from dsv3.distributed.step_waits import STEP_WAITS, StepWaits

NOTABLE = 0.1
"""Share of a step's time from which a slow rank is named ..."""

WINDOWS = 2
"""... once it has been the slowest so often in a row: anything may hold up a rank for a moment."""

PROBE_WIDTH, PROBE_REPEATS = 2048, 20
"""The matmul of a GPU's probe: 16 MiB in bf16, below 2 ms on an H100."""


class RankTimes(NamedTuple):
    """The times of one rank, in seconds per step."""

    waited: float
    """For other ranks, as far as that is seen."""
    seconds: float
    """The whole step."""
    data: float
    """For its batch."""
    probe: float = 0.0
    """Of the fixed matmul; 0 on CPU."""


class Straggler(NamedTuple):
    """The slowest rank."""

    rank: int
    share: float
    """Of a step's time, from 0 to 1."""
    cause: str
    """For people; empty where it is unknown."""


def find_straggler(times: Sequence[RankTimes], stages: int = 1) -> Straggler:
    """Return the slowest of all ranks, which are as many in each pipeline stage, one stage after another.

    A rank is compared with those of its own stage, because stages differ by nature; where a stage is one
    rank, with all.
    """
    per_stage = len(times) // stages
    seconds = max(max(each.seconds for each in times), 1e-9)
    probe = median_low([each.probe for each in times])
    found = []
    for rank, own in enumerate(times):
        first = rank // per_stage * per_stage
        peers = times[first : first + per_stage] if per_stage > 1 else times
        late = median_high([each.waited for each in peers]) - own.waited
        for_data = own.data - median_low([each.data for each in peers])
        waits_for_data = for_data > late / 2 and late > 0
        found.append(Straggler(rank, late / seconds, "it waits for its data" if waits_for_data else ""))
        if own.probe > 0:
            slower = f"its device takes {own.probe / max(probe, 1e-9):.2f} times as long as most for a matmul"
            found.append(Straggler(rank, 1 - probe / own.probe, slower))
    return max(found, key=lambda each: each.share)


class DeviceProbe:
    """Times a fixed matmul on a GPU; nothing on CPU, where ranks share cores."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def seconds(self) -> float:
        """Return the time of the matmuls by the device's clock; the host waits for it."""
        if self.device.type != "cuda":
            return 0.0
        a = torch.ones(PROBE_WIDTH, PROBE_WIDTH, dtype=torch.bfloat16, device=self.device)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        out = a @ a  # the first one may have to choose its kernel
        begin.record()
        for _ in range(PROBE_REPEATS):
            torch.mm(a, a, out=out)
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1000


class StragglerWatch:
    """Watches the ranks of one run; all ranks call every method together."""

    def __init__(self, ranks: RankContext, stages: int, waits: StepWaits = STEP_WAITS) -> None:
        self.ranks = ranks
        self.stages = stages
        self.waits = waits
        self.probe = DeviceProbe(ranks.device)
        self.hosts: list[str] = []
        self._data, self._steps = 0.0, 0
        self._is_first_step = True
        self._suspect, self._windows = -1, 0

    def start(self, compiled: bool) -> None:
        """Begin to measure."""
        self.hosts = self.ranks.all_gather_object(socket.gethostname())
        self.waits.start(self.ranks.device, compiled)

    def stop(self) -> None:
        """Measure no more."""
        self.waits.stop()

    def count(self, waited_for_data: float) -> None:
        """Count a step; the first one is left out, in which much is done for the first time."""
        if self._is_first_step:
            self._is_first_step = False
            self.waits.take()
        else:
            self._data += waited_for_data
            self._steps += 1

    def compare(self) -> tuple[Straggler | None, str]:
        """Return the slowest rank since the last call, and what the user should know of it or "".

        None where no step was counted.
        """
        measured, data = self.waits.take(), self._data / max(self._steps, 1)
        self._data, self._steps = 0.0, 0
        if measured is None:  # on all ranks alike
            return None, ""
        own = RankTimes(measured.waited, measured.seconds, data, self.probe.seconds())
        table = self.ranks.all_gather(torch.tensor(own, dtype=torch.float64, device=self.ranks.device))
        found = find_straggler([RankTimes(*row) for row in table.tolist()], self.stages)
        return found, self._judge(found)

    def _judge(self, found: Straggler) -> str:
        """Return a line on a rank that goes on being slow, at the 2nd, 4th, 8th .. time in a row."""
        if found.share < NOTABLE or found.rank != self._suspect:
            self._suspect, self._windows = found.rank, 0
        if found.share < NOTABLE:
            return ""
        self._windows += 1
        if self._windows < WINDOWS or self._windows & (self._windows - 1):
            return ""
        cause = f": {found.cause}" if found.cause else ""
        return (
            f"the other ranks wait {found.share:.0%} of a step for rank {found.rank} "
            f"({self.hosts[found.rank]}){cause}"
        )


def summary(times: Sequence[tuple[int | None, float | None]]) -> str:
    """Return a line on rank and share of the slowest of many times; "" where none is known."""
    found = [(rank, share) for rank, share in times if rank is not None and share is not None]
    if not found:
        return ""
    (rank, count), *_ = Counter(rank for rank, _ in found).most_common(1)
    share = median(share for _, share in found)
    return f"others wait {max(share, 0.0):.0%} of a step; rank {rank} in {count} of {len(found)} times"
