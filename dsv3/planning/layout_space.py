"""The layouts that a search looks through: every value of every open choice that a run would accept.

A layout is refused by the functions that refuse a run (layout.py, pipeline_stages.py, checks.py): there is no
second set of rules. Of what is legal some values are left out, unless they are typed, because they only waste
a search's time: the constants below say which.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any, NamedTuple

from dsv3.config.hardware import HardwareConfig
from dsv3.config.parallel import (
    DispatchBackend,
    ParallelConfig,
    PipelineConfig,
    RecomputeMode,
    Schedule,
)
from dsv3.config.precision import PrecisionConfig
from dsv3.config.root import Config
from dsv3.errors import UserError
from dsv3.planning.batch_schedule import BatchSchedule
from dsv3.planning.checks import check_expert_backend
from dsv3.planning.layout import (
    NODE_RANKS,
    ParallelDims,
    check_batch,
    check_model,
    check_sequence,
    check_stages,
    check_wrappers,
    expert_degrees,
    tensor_degrees,
)
from dsv3.planning.memory import MemoryBytes
from dsv3.planning.pipeline_stages import reshard_after_forward
from dsv3.planning.plan import Plan, shape_of
from dsv3.planning.step_shape import StepShape
from dsv3.planning.traffic import TrafficBytes

LEAST_TOKENS = 1024
"""Fewest tokens of a sequence on a rank of cp: smaller parts leave attention too little to compute."""

MOST_TOKENS = 65536
"""Most tokens of a microbatch of several sequences: matmuls grow no faster beyond."""

VIRTUAL_STAGES = (2, 3, 4, 6, 8)
"""Virtual stages per rank of the interleaved schedules."""


class Pipeline(NamedTuple):
    """A pipeline's schedule; `stages_per_rank` is None where the schedule has its own number."""

    schedule: Schedule
    stages_per_rank: int | None = None


@dataclass(frozen=True)
class Layout:
    """Choices of a search for a run."""

    degrees: ParallelDims
    pipeline: Pipeline | None
    """None with one pipeline stage."""
    reshard_after_forward: bool | None
    """None on one rank."""
    microbatch_size: int
    recompute: RecomputeMode
    precision: str
    """Name of the formats, among those of the search."""

    def changes(self) -> dict[str, Any]:
        """Return the values of the layout by their keys; `precision` and `recompute` are names of choices."""
        values: dict[str, Any] = {f"parallel.degrees.{axis}": n for axis, n in self.degrees.to_json().items()}
        if self.pipeline is not None:
            values["parallel.schedule"] = self.pipeline.schedule.name
            if self.pipeline.stages_per_rank is not None:
                values["parallel.pipeline.stages_per_rank"] = self.pipeline.stages_per_rank
        if self.reshard_after_forward is not None:
            values["parallel.reshard_after_forward"] = self.reshard_after_forward
        values["train.microbatch_size"] = self.microbatch_size
        return {**values, "recompute": self.recompute.value, "precision": self.precision}


class Cell(NamedTuple):
    """Layouts that differ in the split of their data-parallel ranks and in reshard_after_forward alone."""

    pp: int
    cp: int
    tp: int
    ep: int
    pipeline: Pipeline | None
    precision: str
    microbatch_size: int
    recompute: RecomputeMode


@dataclass(frozen=True)
class Choices:
    """All that is open to a search; everything else is as the config has it."""

    precisions: Mapping[str, PrecisionConfig]
    axes: Mapping[str, int] = field(default_factory=dict)
    """Degrees that are typed."""
    least: Mapping[str, int] = field(default_factory=dict)
    """Smallest degree of an open axis, where it is not 1."""
    schedule: Schedule | None = None
    stages_per_rank: int | None = None
    reshard: bool | None = None
    microbatch_size: int | None = None
    recompute: RecomputeMode | None = None


class LayoutSpace:
    """The legal layouts of a completed config on `world` ranks."""

    def __init__(self, config: Config, world: int, hardware: HardwareConfig, choices: Choices) -> None:
        self.config, self.world, self.hardware, self.choices = config, world, hardware, choices
        self.model, self.length = config.model, config.train.length
        self.batch = BatchSchedule.of(config.train)
        self.refusal = ""
        """The last message of a check that a layout has failed."""
        self._shapes: dict[Any, StepShape] = {}
        self._reshards: dict[Any, list[bool | None]] = {}

    @cached_property
    def splits(self) -> dict[tuple[int, int, int, int], list[int]]:
        """Return, per (pp, cp, tp, ep), the values of dp_replicate that are legal, in order."""
        found: dict[tuple[int, int, int, int], list[int]] = {}
        for degrees in self._degrees():
            if self._is_legal(degrees):
                key = (degrees.pp, degrees.cp, degrees.tp, degrees.ep)
                found.setdefault(key, []).append(degrees.dp_replicate)
        return found

    def cells(self) -> Iterator[Cell]:
        """Yield the cells of the space: each has a legal layout."""
        open_modes, modes = self.choices.recompute, tuple(RecomputeMode)
        modes = modes if open_modes is None else (open_modes,)
        runs: dict[Any, list[int]] = {}
        for (pp, cp, tp, ep), replicas in self.splits.items():
            degrees = self.degrees(pp, cp, tp, ep, replicas[0])
            for pipeline in self.pipelines(pp):
                key = (pp, degrees.data_parallel, pipeline)
                if key not in runs:
                    runs[key] = list(self._microbatch_sizes(degrees, pipeline))
                for precision in self.choices.precisions:
                    if self._backend_runs(degrees, pipeline, precision):
                        for size in runs[key]:
                            for mode in modes:
                                yield Cell(pp, cp, tp, ep, pipeline, precision, size, mode)

    def layouts(self, cell: Cell) -> Iterator[Layout]:
        """Yield the layouts of a cell, those that shard over most ranks first."""
        for replicas in self.splits[cell.pp, cell.cp, cell.tp, cell.ep]:
            degrees = self.degrees(cell.pp, cell.cp, cell.tp, cell.ep, replicas)
            for reshard in self.reshards(cell.pp, cell.pipeline):
                yield Layout(
                    degrees, cell.pipeline, reshard, cell.microbatch_size, cell.recompute, cell.precision
                )

    def degrees(self, pp: int, cp: int, tp: int, ep: int, dp_replicate: int) -> ParallelDims:
        """Return the degrees with all ranks that are left as shards."""
        return ParallelDims(pp, dp_replicate, self.world // (pp * cp * tp * dp_replicate), cp, tp, ep)

    def shape(self, layout: Layout) -> StepShape:
        """Return the step of a layout."""
        pipeline, reshard, pp = layout.pipeline, layout.reshard_after_forward, layout.degrees.pp
        key = (pipeline, reshard, pp, layout.precision)
        if key not in self._shapes:
            config = replace(
                self.config,
                parallel=self._parallel(pipeline, reshard),
                precision=self.choices.precisions[layout.precision],
            )
            config = replace(config, train=replace(config.train, microbatch_size=layout.microbatch_size))
            self._shapes[key] = shape_of(config, layout.degrees, self.hardware)
        unit = layout.microbatch_size * layout.degrees.data_parallel
        return replace(
            self._shapes[key],
            microbatch_size=layout.microbatch_size,
            microbatches=self.batch.final // unit,
            recompute=layout.recompute,
        )

    def pipelines(self, pp: int) -> list[Pipeline | None]:
        """List the schedules and virtual stages that can split the model over `pp` ranks."""
        if pp == 1:
            return [None] if self._stages_split(1, None) else []
        own, typed = self.choices.stages_per_rank, self.choices.schedule
        found: list[Pipeline | None] = []
        for schedule in Schedule if typed is None else (typed,):
            interleaved = schedule in (Schedule.Interleaved1F1B, Schedule.InterleavedZeroBubble)
            numbers = (own,) if own is not None else VIRTUAL_STAGES if interleaved else (None,)
            found += [p for n in numbers if self._stages_split(pp, p := Pipeline(schedule, n))]
        return found

    def reshards(self, pp: int, pipeline: Pipeline | None) -> list[bool | None]:
        """List the values of reshard_after_forward that a schedule runs with."""
        if self.world == 1:
            return [None]
        if (pp, pipeline) not in self._reshards:
            typed = self.choices.reshard
            self._reshards[pp, pipeline] = [
                reshard
                for reshard in ((True, False) if typed is None else (typed,))
                if self._accepts(partial(reshard_after_forward, self._parallel(pipeline, reshard), pp))
            ]
        return self._reshards[pp, pipeline]

    def _degrees(self) -> Iterator[ParallelDims]:
        """Yield degrees whose product is the world, with the values that the model's widths allow."""
        node = self.hardware.devices_per_node or NODE_RANKS
        parts = [cp for cp in _divisors(self.world) if self.length // cp >= LEAST_TOKENS or cp == 1]
        for pp in self._values("pp", _divisors(self.world)):
            for tp in self._values("tp", [tp for tp in tensor_degrees(self.model) if tp <= node]):
                for cp in self._values("cp", parts):
                    left, odd = divmod(self.world, pp * tp * cp)
                    for replicas in [] if odd else self._values("dp_replicate", _divisors(left)):
                        shards, odd = divmod(left, replicas)
                        if odd or shards not in self._values("dp_shard", [shards]):
                            continue
                        degrees = ParallelDims(pp, replicas, shards, cp, tp)
                        for ep in self._values("ep", expert_degrees(degrees, self.model)):
                            yield replace(degrees, ep=ep)

    def _values(self, axis: str, numbers: list[int]) -> list[int]:
        """Return the values of an axis: the typed one, or those of `numbers` that are large enough."""
        typed, least = self.choices.axes.get(axis), self.choices.least.get(axis, 1)
        return [typed] if typed is not None else [n for n in numbers if n >= least]

    def _is_legal(self, degrees: ParallelDims) -> bool:
        def check() -> None:
            check_wrappers(self.config.parallel, degrees)
            check_model(degrees, self.model)
            check_sequence(degrees, self.length)

        return self._accepts(check)

    def _stages_split(self, pp: int, pipeline: Pipeline | None) -> bool:
        degrees, parallel = ParallelDims(pp=pp), self._parallel(pipeline, None)
        return self._accepts(lambda: check_stages(parallel, degrees, self.model))

    def _microbatch_sizes(self, degrees: ParallelDims, pipeline: Pipeline | None) -> Iterator[int]:
        """Yield the sizes with which the batch splits over the ranks and the schedule runs."""
        parallel, typed = self._parallel(pipeline, None), self.choices.microbatch_size
        size = typed or 1
        while size == (typed or 1) or (typed is None and size * self.length <= MOST_TOKENS):
            if self._accepts(partial(check_batch, parallel, degrees, self.batch, size)):
                yield size
            size *= 2

    def _backend_runs(self, degrees: ParallelDims, pipeline: Pipeline | None, precision: str) -> bool:
        expert = self.config.parallel.expert
        if expert is None or expert.backend is not DispatchBackend.deepep:
            return True
        config = replace(self.config, precision=self.choices.precisions[precision])
        reshard = self.reshards(degrees.pp, pipeline)[0]
        size = self.config.train.microbatch_size or 1
        layout = Layout(degrees, pipeline, reshard, size, RecomputeMode.none, precision)
        nothing = MemoryBytes(0, 0, 0, 0)
        plan = Plan(self.model, degrees, self.hardware, self.shape(layout), nothing, TrafficBytes())
        return self._accepts(lambda: check_expert_backend(config, plan))

    def _accepts(self, check: Callable[[], object]) -> bool:
        """Return True where a check of a run passes."""
        try:
            check()
        except UserError as error:
            self.refusal = str(error)
            return False
        return True

    def _parallel(self, pipeline: Pipeline | None, reshard: bool | None) -> ParallelConfig:
        parallel = replace(self.config.parallel, reshard_after_forward=reshard)
        if pipeline is None:
            return parallel
        own = replace(parallel.pipeline or PipelineConfig(), stages_per_rank=pipeline.stages_per_rank)
        return replace(parallel, schedule=pipeline.schedule, pipeline=own)


def _divisors(number: int) -> list[int]:
    small = [n for n in range(1, int(number**0.5) + 1) if number % n == 0]
    return sorted({*small, *(number // n for n in small)})
