"""The search for layouts: the fastest that fit, and the fastest for each amount of memory.

It goes from the layout that could be fastest to the slowest. A layout's speed has an upper bound that costs
little: no pipeline waits, no FSDP traffic shows, the optimizer takes no time. It is planned exactly only
where the bound says that it may be among the best, or faster than what takes as little memory: nothing is
left out that the results would have contained (tests/planning/test_layout_search.py plans all to compare).
"""

import heapq
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from dsv3.config.model import ModelConfig
from dsv3.config.parallel import RecomputeMode, Schedule
from dsv3.planning import parameters
from dsv3.planning.group_bytes import stage_bytes
from dsv3.planning.kernel_time import KernelTimes
from dsv3.planning.layout import ParallelDims
from dsv3.planning.layout_space import Cell, Layout, LayoutSpace
from dsv3.planning.memory import MemoryBytes, rank_memory
from dsv3.planning.parameters import Component
from dsv3.planning.pipeline_stages import build_stages
from dsv3.planning.sharding import FP32, local_numel
from dsv3.planning.stage_time import StageTimes
from dsv3.planning.step_shape import StepShape
from dsv3.planning.step_time import Cause, StepTime, step_time

FRONT_SPEED = 0.5
"""The front ends where layouts have less than this share of the best one's speed."""

FRONT_GAIN = 0.01
"""Speed that a layout must gain over those with less memory to be on the front."""

_MODES = list(RecomputeMode)
"""From none to most recomputation."""


@dataclass(frozen=True)
class Found:
    """A layout with its plan."""

    layout: Layout
    memory: MemoryBytes
    time: StepTime

    @property
    def speed(self) -> float:
        """Tokens per second and rank."""
        return self.time.tokens_per_second_per_gpu


@dataclass
class SearchResult:
    """Results of a search."""

    best: list[Found]
    """The fastest, best first."""
    front: list[Found]
    """From the fastest to the one that takes least memory: each is faster than all that take less."""
    seen: list[Found]
    """Every layout that was planned and fits."""
    legal: int
    """Layouts that a run would accept."""
    planned: int
    """Layouts whose memory or time was computed, because bounds did not decide."""


def merged(parts: Sequence[SearchResult], count: int) -> SearchResult:
    """Return what one search would have found, from those of all parts of its space."""
    kept = _Kept(count, wants_front=True, found=[found for part in parts for found in part.seen])
    legal, planned = (sum(getattr(part, name) for part in parts) for name in ("legal", "planned"))
    return SearchResult(kept.best(), kept.front(), kept.found, legal, planned)


class LayoutSearch:
    """One search through a space of layouts."""

    def __init__(self, space: LayoutSpace) -> None:
        self.space = space
        self.room = space.hardware.memory_bytes
        self.planned = 0
        self._works: dict[object, float] = {}
        self._least_recompute = space.choices.recompute or RecomputeMode.none
        overlap = space.hardware.overlap
        self._hides_dispatch = overlap.ep_paired > overlap.ep
        self._memories: dict[object, MemoryBytes] = {}
        self._known: dict[object, list[tuple[int, int, int]]] = {}
        """Per group of cells: microbatch size and recomputation of plans, and a floor for others."""
        self._smallest_sizes: dict[object, int] = {}
        self._most_recompute = space.choices.recompute or _MODES[-1]

    def run(self, count: int, front: bool = True, part: tuple[int, int] = (0, 1)) -> SearchResult:
        """Return the `count` fastest layouts that fit, and with `front` the front of speed against memory.

        Args:
            part: (k, n) searches only every n-th (pp, cp, tp, ep), from number k on; see `merged`.
        """
        number, parts = part
        own = set(itertools.islice(self.space.splits, number, None, parts))
        kept = _Kept(count, front)
        order = itertools.count()
        tokens = self.space.batch.final * self.space.length
        waiting: list[tuple[float, int, Cell, tuple[Layout, ...] | None]] = []
        refined: set[Cell] = set()
        legal = 0
        for cell in self.space.cells():
            if cell[:4] not in own:
                continue
            self._smallest_sizes.setdefault(cell[:6], cell.microbatch_size)
            legal += len(self.space.splits[cell[:4]]) * len(self.space.reshards(cell.pp, cell.pipeline))
            # Recomputation only adds work: without it the bound serves three cells.
            speed = self.most_speed(cell._replace(recompute=self._least_recompute), tokens)
            waiting.append((-speed, next(order), cell, None))
        heapq.heapify(waiting)
        while waiting:
            bound, _, cell, rest = heapq.heappop(waiting)
            if kept.is_complete(-bound):
                break
            if rest is not None:
                for layout in rest:
                    self._plan(layout, kept, -bound)
                continue
            floor = self.floor(cell)
            if not self._fits(floor) or not kept.wants(-bound, floor):
                continue
            if cell not in refined:
                refined.add(cell)
                speed = self.most_speed(cell, tokens)
                heapq.heappush(waiting, (max(bound, -speed), next(order), cell, None))
                continue
            # Layouts of a cell differ in what FSDP and the optimizer take: the first tells what all take.
            first, *others = self.space.layouts(cell)
            memory = self.memory(first)
            if not self._fits(memory.total) or not kept.wants(-bound, memory.total):
                continue
            found = self._timed(first, memory)
            kept.add(found)
            if others:
                speed = self.common_speed(found, tokens)
                heapq.heappush(waiting, (max(bound, -speed), next(order), cell, tuple(others)))
        return SearchResult(kept.best(), kept.front(), kept.found, legal, self.planned)

    def first_that_fits(self) -> Found | None:
        """Return some layout that fits, None where none does: whether any does costs less than the best."""
        if not self._fits(self._least_state()):
            return None
        # Those that split the model over most ranks are the likeliest to fit.
        likely = sorted(self._smallest(), key=lambda layout: -layout.degrees.pp * layout.degrees.ep)
        for layout in likely:
            memory = self.memory(layout)
            if self._fits(memory.total):
                return self._timed(layout, memory)
        return None

    def least_memory(self) -> tuple[Layout, MemoryBytes] | None:
        """Return the layout that takes least memory, and what it takes; None where no layout is legal."""
        planned = ((layout, self.memory(layout)) for layout in self._smallest())
        return min(planned, key=lambda pair: pair[1].total, default=None)

    def _smallest(self) -> Iterator[Layout]:
        """Yield the layouts that take least memory: of each group of cells the smallest microbatch."""
        smallest: dict[object, Cell] = {}
        for cell in self.space.cells():
            own = smallest.setdefault((*cell[:6], cell.recompute), cell)
            if cell.microbatch_size < own.microbatch_size:
                smallest[*cell[:6], cell.recompute] = cell
        most = {cell[:6]: 0 for cell in smallest.values()}
        for cell in smallest.values():
            most[cell[:6]] = max(most[cell[:6]], _MODES.index(cell.recompute))
        for cell in smallest.values():
            if _MODES.index(cell.recompute) == most[cell[:6]]:
                yield next(self.space.layouts(cell))

    def _least_state(self) -> int:
        """Return the bytes of a rank if parameters, gradients and optimizer state were shared out evenly."""
        for cell in self.space.cells():
            state = self.space.shape(next(self.space.layouts(cell))).state
            (whole,) = build_stages(self.space.model, 1)
            groups = stage_bytes(self.space.model, whole, ParallelDims(), state, False)
            total = sum(group.parameters + group.gradients + group.optimizer for group in groups)
            return total // self.space.world
        return 0

    def _fits(self, memory: int) -> bool:
        return self.room is None or memory <= self.room

    def _plan(self, layout: Layout, kept: "_Kept", bound: float) -> None:
        """Plan a layout whose speed is at most `bound`, if it may be among the results."""
        memory = self.memory(layout)
        if self._fits(memory.total) and kept.wants(bound, memory.total):
            kept.add(self._timed(layout, memory))

    def _timed(self, layout: Layout, memory: MemoryBytes) -> Found:
        space = self.space
        time = step_time(space.model, layout.degrees, space.shape(layout), space.hardware)
        assert time is not None
        return Found(layout, memory, time)

    def plan(self, layout: Layout) -> Found:
        """Plan a layout exactly."""
        return self._timed(layout, self.memory(layout))

    def common_speed(self, found: Found, tokens: int) -> float:
        """Return an upper bound of the speed of a plan's cell: without FSDP's traffic and the optimizer."""
        common = found.time.seconds - found.time.causes[Cause.dp] - found.time.causes[Cause.optimizer]
        return tokens / common / self.space.world

    def most_speed(self, cell: Cell, tokens: int) -> float:
        """Return an upper bound of a cell's tokens per second and rank: ranks that share all work evenly."""
        degrees = self.space.degrees(cell.pp, cell.cp, cell.tp, cell.ep, 1)
        microbatches = self.space.batch.final // (cell.microbatch_size * degrees.data_parallel)
        return tokens / (microbatches * self._work(cell) / cell.pp) / self.space.world

    def _work(self, cell: Cell) -> float:
        """Return the seconds of one microbatch in the whole model on the ranks of one stage."""
        space = self.space
        dual = cell.pipeline is not None and cell.pipeline.schedule is Schedule.DualPipeV
        paired = dual and self._hides_dispatch
        key = (cell.cp, cell.tp, cell.ep, paired, *cell[5:])
        if key not in self._works:
            layout = next(space.layouts(cell))
            shape = space.shape(layout)
            kernels = KernelTimes.of(space.hardware, shape)
            assert kernels is not None
            times = StageTimes(space.model, layout.degrees, shape, space.hardware, kernels)
            (whole,) = build_stages(space.model, 1)
            self._works[key] = sum(sum(part.values()) for part in times.stage(whole))
        return self._works[key]

    def floor(self, cell: Cell) -> int:
        """Return a lower bound of the memory of every layout of a cell.

        A larger microbatch takes no less memory, and so does less recomputation: what was planned of the same
        degrees and schedule bounds the rest, first of all the smallest microbatch with most recomputation.
        """
        mode, apart = _MODES.index(cell.recompute), self._has_one_microbatch(cell)
        group = (*cell[:6], apart and cell.microbatch_size)
        known = self._known.setdefault(group, [])
        if not known:
            size = cell.microbatch_size if apart else self._smallest_sizes[cell[:6]]
            self.memory(
                next(self.space.layouts(cell._replace(microbatch_size=size, recompute=self._most_recompute)))
            )
        return max(
            (least for size, own, least in known if size <= cell.microbatch_size and own >= mode), default=0
        )

    def memory(self, layout: Layout) -> MemoryBytes:
        """Return the memory of a layout."""
        space, shape = self.space, self.space.shape(layout)
        if not shape.gathers_in_fp8 and space.world > 1:
            shape = replace(shape, fp8=None)  # FP8 matmuls alone change nothing of what shards hold
        key = (layout.degrees, shape)
        if key not in self._memories:
            self.planned += 1
            self._memories[key] = rank_memory(space.model, layout.degrees, shape)
        memory, degrees = self._memories[key], layout.degrees
        cell = Cell(
            degrees.pp, degrees.cp, degrees.tp, degrees.ep, layout.pipeline, layout.precision,
            layout.microbatch_size, layout.recompute,
        )  # fmt: skip
        if layout == next(space.layouts(cell)):
            least = memory.total - recomputed_besides(space.model, degrees, shape)
            group = (*cell[:6], self._has_one_microbatch(cell) and cell.microbatch_size)
            self._known.setdefault(group, []).append(
                (cell.microbatch_size, _MODES.index(cell.recompute), least)
            )
        return memory

    def _has_one_microbatch(self, cell: Cell) -> bool:
        """Return True where a step is one microbatch: gradients come as activations go, and count less."""
        ranks = self.space.world // (cell.pp * cell.cp * cell.tp)
        return self.space.batch.final == cell.microbatch_size * ranks


def recomputed_besides(model: ModelConfig, degrees: ParallelDims, shape: StepShape) -> int:
    """Return the most by which a step's fullest moment may grow because it recomputes, if that saves nothing.

    A layer's input and the gradient that has arrived are there while the layer is computed again. With FSDP
    alone the end of its forward pass then also meets gradients of weights (step_peak.py): those that wait for
    the end of the backward pass, and those of the layer after it but for its experts.
    """
    if shape.recompute is RecomputeMode.none:
        return 0
    inputs = 2 * shape.tokens(degrees) * model.dim * shape.state.compute
    if degrees.pp > 1 or degrees.world_size == 1:
        return inputs
    root = [*parameters.embedding(model), *parameters.output(model)] if degrees.tp == 1 else []
    layer = [w for w in parameters.block(model, dense=False) if w.component is not Component.experts]
    of_root, of_layer = (sum(local_numel(w, degrees) for w in each) for each in (root, layer))
    return inputs + of_root * shape.state.compute + of_layer * FP32


@dataclass
class _Kept:
    """Results of a search so far, and what could still be among them."""

    count: int
    wants_front: bool
    found: list[Found] = field(default_factory=list)
    _speeds: list[float] = field(default_factory=list)
    """The fastest `count`, as a heap."""
    _steps: list[tuple[int, float]] = field(default_factory=list)
    """Memory and speed of the front so far, ascending in both."""

    def add(self, found: Found) -> None:
        """Take a planned layout that fits."""
        self.found.append(found)
        heapq.heappush(self._speeds, found.speed)
        if len(self._speeds) > self.count:
            heapq.heappop(self._speeds)
        memory, speed = found.memory.total, found.speed
        if not any(m <= memory and s >= speed for m, s in self._steps):
            rest = [(m, s) for m, s in self._steps if m < memory or s > speed]
            self._steps = sorted([*rest, (memory, speed)])

    def is_among_best(self, speed: float) -> bool:
        """Return True where a layout of at most this speed may be among the best."""
        return len(self._speeds) < self.count or speed >= self._speeds[0]

    def wants(self, speed: float, memory: int) -> bool:
        """Return True where a layout of at most this speed, and at least this memory, may be a result."""
        if self.is_among_best(speed):
            return True
        fast = self.wants_front and speed >= FRONT_SPEED * self._steps[-1][1]
        return fast and not any(m <= memory and s * (1 + FRONT_GAIN) >= speed for m, s in self._steps)

    def is_complete(self, speed: float) -> bool:
        """Return True where no layout of at most this speed can be a result."""
        if self.is_among_best(speed):
            return False
        return not self.wants_front or speed < FRONT_SPEED * self._steps[-1][1]

    def best(self) -> list[Found]:
        """Return the fastest, and among equal ones first that with least memory."""
        return sorted(self.found, key=lambda found: (-found.speed, found.memory.total))[: self.count]

    def front(self) -> list[Found]:
        """Return the front: from the least memory up, what is faster by FRONT_GAIN than all before."""
        front: list[Found] = []
        fastest = max((found.speed for found in self.found), default=0.0)
        for each in sorted(self.found, key=lambda found: (found.memory.total, -found.speed)):
            gains = not front or each.speed > front[-1].speed * (1 + FRONT_GAIN)
            if gains and each.speed >= FRONT_SPEED * fastest:
                front.append(each)
        return front[::-1]
