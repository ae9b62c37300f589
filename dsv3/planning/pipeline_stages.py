"""Pipeline stages: the layers of each stage, the stages of each rank, and the constraints of a schedule.

Plain integers, shared by the plan and by parallel/pipeline_parallel.py. The constraints of the schedules are
those of torch.distributed.pipelining.schedules (torch 2.13); tests/planning/test_pipeline_stages.py holds
them to it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

from dsv3.config.model import ModelConfig
from dsv3.config.parallel import ParallelConfig, PipelineConfig, Schedule
from dsv3.errors import UserError
from dsv3.planning import parameters
from dsv3.planning.parameters import Weight

SPLIT = "parallel.pipeline.split"

PER_RANK = "parallel.pipeline.stages_per_rank"

_V_SHAPED = (Schedule.ZBVZeroBubble, Schedule.DualPipeV)

_INTERLEAVED = (Schedule.Interleaved1F1B, Schedule.InterleavedZeroBubble)


def is_v_shaped(schedule: Schedule) -> bool:
    """Return True if a rank has one stage from the front and its mirror image from the back."""
    return schedule in _V_SHAPED


def splits_backward(schedule: Schedule) -> bool:
    """Return True if gradients of inputs and of weights are computed apart, which forbids freeing parameters.

    Over FSDP2 with reshard_after_forward=True such a schedule gives wrong gradients and no error.
    """
    return is_v_shaped(schedule) or schedule is Schedule.InterleavedZeroBubble


def reshard_after_forward(config: ParallelConfig, pp: int) -> bool:
    """Decide if gathered parameters are freed after the forward pass: as configured, else if it is correct.

    Raises UserError if it is configured for a schedule that cannot do it.
    """
    keeps = pp > 1 and splits_backward(config.schedule)
    if keeps and config.reshard_after_forward:
        raise UserError(
            f"parallel.reshard_after_forward=true gives wrong gradients with parallel.schedule="
            f"{config.schedule.name} on pp={pp}: leave it out, or take GPipe, 1F1B or Interleaved1F1B"
        )
    return not keeps if config.reshard_after_forward is None else config.reshard_after_forward


def stages_per_rank(schedule: Schedule, pipeline: PipelineConfig) -> int:
    """Return the virtual stages per rank: as configured, else 1, or 2 if the schedule needs several.

    Raises UserError for a number that the schedule does not take.
    """
    typed = pipeline.stages_per_rank
    if is_v_shaped(schedule):
        allowed, valid = "exactly 2", typed in (None, 2)
    elif schedule in _INTERLEAVED:
        allowed, valid = "2 or more", typed is None or typed >= 2
    else:
        allowed, valid = "1 (Interleaved1F1B takes more)", typed in (None, 1)
    if not valid:
        raise UserError(f"{PER_RANK}={typed}: parallel.schedule={schedule.name} takes {allowed}")
    return typed or (2 if is_v_shaped(schedule) or schedule in _INTERLEAVED else 1)


def stage_count(config: ParallelConfig, pp: int) -> int:
    """Count the stages of all ranks; 1 without pipeline parallelism."""
    return 1 if pp == 1 else pp * stages_per_rank(config.schedule, config.pipeline or PipelineConfig())


def stages_of_rank(schedule: Schedule, rank: int, pp: int, per_rank: int) -> list[int]:
    """List the stages of pipeline rank `rank` of `pp`, in order: every pp-th one, or the two arms of a V."""
    if is_v_shaped(schedule):
        return [rank, 2 * pp - 1 - rank]
    return [rank + n * pp for n in range(per_rank)]


def check_microbatches(
    schedule: Schedule, pp: int, per_rank: int, microbatches: int, sequences: int | None = None
) -> None:
    """Raise UserError if `schedule` cannot run `microbatches` per step over `pp` x `per_rank` stages.

    `sequences` is what one microbatch takes of the global batch; with it the error names batch sizes too.
    """
    if supports_microbatches(schedule, pp, per_rank, microbatches):
        return
    near = [n for n in range(1, microbatches) if supports_microbatches(schedule, pp, per_rank, n)][-1:]
    above = range(microbatches + 1, microbatches + 2 * pp * per_rank + 1)
    near += [n for n in above if supports_microbatches(schedule, pp, per_rank, n)][:1]
    fix = f"microbatches that work: {' or '.join(map(str, near))}"
    if sequences is not None:
        fix += f", by train.global_batch_size={' or '.join(str(n * sequences) for n in near)}"
    raise UserError(
        f"parallel.schedule={schedule.name} on {pp * per_rank} stages (pp={pp} x {per_rank}) cannot run "
        f"{microbatches} microbatches a step\n"
        f"{fix} or another train.microbatch_size"
    )


def supports_microbatches(schedule: Schedule, pp: int, per_rank: int, microbatches: int) -> bool:
    """Return True if `schedule` runs with `microbatches` per step."""
    if microbatches < 1:
        return False
    if schedule in _INTERLEAVED:
        rounds = max(1, microbatches // pp)
        return microbatches % rounds == 0
    least = {Schedule["1F1B"]: pp, Schedule.DualPipeV: pp * per_rank}
    return microbatches >= least.get(schedule, 1)


def min_microbatches(schedule: Schedule, pp: int, per_rank: int) -> int:
    """Return the fewest microbatches per step that run and keep every rank busy for a time."""
    return pp * per_rank if schedule is Schedule.DualPipeV else pp


def split_layers(model: ModelConfig, stages: int, first_layers: list[int] | None = None) -> list[range]:
    """Split the main model's layers into `stages` stages, as `first_layers` says or balanced by cost.

    The balance makes the largest stage as small as possible, then the sum of squares; among equals the
    earlier stages have more layers. `first_layers` names the first layer of every stage except the first.
    Raises UserError if a stage would have no layer.
    """
    if stages > model.num_layers:
        raise UserError(
            f"{stages} pipeline stages need a layer each, but model.num_layers={model.num_layers}: "
            f"lower parallel.degrees.pp or {PER_RANK} to {model.num_layers} stages or fewer"
        )
    if first_layers is not None:
        bounds = _check_split(model, stages, first_layers)
    else:
        bounds = _balanced_bounds(model, stages)
    return [range(first, end) for first, end in pairwise(bounds)]


@lru_cache(maxsize=256)
def _balanced_bounds(model: ModelConfig, stages: int) -> list[int]:
    """Return the bounds of the balanced stages; a search for a layout asks for the same ones many times."""
    # Running cost of the layers, with that of embedding, head and MTP depths at the ends.
    front, back = extra_costs(model)
    sums = [front]
    for cost in layer_costs(model):
        sums.append(sums[-1] + cost)
    sums[0], sums[-1] = 0, sums[-1] + back
    largest = _best_partition(sums, stages, None)[0]
    return _best_partition(sums, stages, largest)[1]


def layer_costs(model: ModelConfig) -> list[int]:
    """Count the matmul weights that a token meets in each layer of the main model."""
    return [parameters.active_matmul_parameters(layer, model) for layer in parameters.layers(model)]


def extra_costs(model: ModelConfig) -> tuple[int, int]:
    """Count the same for the first stage's lookup, and for the last stage's head and MTP depths."""
    head = parameters.active_matmul_parameters(parameters.output(model), model)
    depths = sum(
        parameters.active_matmul_parameters(module, model) + head for module in parameters.mtp_modules(model)
    )
    return model.dim, head + depths


def _check_split(model: ModelConfig, stages: int, first_layers: list[int]) -> list[int]:
    """Return the bounds that a user's split gives, or raise UserError if it does not fit the stages."""
    if len(first_layers) != stages - 1:
        raise UserError(
            f"{SPLIT}={first_layers} names the first layers of {len(first_layers)} stages; "
            f"{stages} stages need {stages - 1} (all but the first)"
        )
    bounds = [0, *first_layers, model.num_layers]
    if any(first >= end for first, end in pairwise(bounds)):
        raise UserError(
            f"{SPLIT}={first_layers} leaves a stage without a layer: "
            f"take ascending numbers from 1 to {model.num_layers - 1} (model.num_layers={model.num_layers})"
        )
    return bounds


def _best_partition(sums: list[int], stages: int, limit: int | None) -> tuple[int, list[int]]:
    """Partition layers, given their running cost `sums`, into `stages` runs; return the score and the bounds.

    The score is the largest run, or with a `limit` on it the sum of squares; smaller is better. Exact dynamic
    programming from the back: for each number of stages and each first layer.
    """
    layers = len(sums) - 1
    tails: list[tuple[int, list[int]] | None] = [None] * layers + [(0, [layers])]
    for remaining in range(1, stages + 1):
        before, tails = tails, [None] * (layers + 1)
        for first in range(layers - remaining, -1, -1):
            for end in range(first + 1, layers - remaining + 2):
                cost, tail, best = sums[end] - sums[first], before[end], tails[first]
                least = cost if limit is None else cost * cost
                if (limit is not None and cost > limit) or (best is not None and least > best[0]):
                    break  # a longer stage costs more still: without this, 1,000 layers take minutes
                if tail is None:
                    continue
                score = max(cost, tail[0]) if limit is None else least + tail[0]
                if best is None or score <= best[0]:  # a later end wins: the earlier stage is larger
                    tails[first] = score, [first, *tail[1]]
    found = tails[0]
    assert found is not None
    return found


@dataclass(frozen=True)
class PipelineShape:
    """Schedule, virtual stages per rank and the user's split; without meaning for pp = 1."""

    schedule: Schedule = Schedule["1F1B"]
    per_rank: int = 1
    split: tuple[int, ...] | None = None


@dataclass(frozen=True)
class StageLayers:
    """The layers of one pipeline stage, and its parts of embedding, head and MTP."""

    index: int
    """Number of the stage, from 0."""
    stages: int
    """Number of all stages."""
    dense: tuple[bool, ...]
    """Per layer of the main model in this stage, true if it is dense and false if it is MoE."""
    mtp_depths: int
    first_layer: int = 0
    """Number of the first layer in the main model."""

    @property
    def block_kinds(self) -> list[bool]:
        """`dense` with the layers of the MTP depths, which are never dense."""
        return [*self.dense, *[False] * self.mtp_depths]

    @property
    def kind(self) -> tuple[object, ...]:
        """Return what decides the shapes of a stage's weights: stages of one kind differ in names alone."""
        return self.dense, self.mtp_depths, self.is_first, self.is_last

    @property
    def is_first(self) -> bool:
        """True if the stage has the embedding."""
        return self.index == 0

    @property
    def is_last(self) -> bool:
        """True if the stage has the head."""
        return self.index == self.stages - 1

    @property
    def embeds(self) -> int:
        """Lookups of a microbatch in the stage's embedding: one for the first layer and one per MTP depth."""
        return int(self.is_first) + self.mtp_depths

    @property
    def predictions(self) -> int:
        """Passes of a microbatch through the stage's head."""
        return int(self.is_last) * (1 + self.mtp_depths)


def build_stages(config: ModelConfig, count: int, split: Sequence[int] | None = None) -> list[StageLayers]:
    """Return the `count` stages of all ranks in order; `split` names their first layers, None balances."""
    return list(_built_stages(config, count, None if split is None else tuple(split)))


@lru_cache(maxsize=256)
def _built_stages(config: ModelConfig, count: int, split: tuple[int, ...] | None) -> list[StageLayers]:
    layers = split_layers(config, count, None if split is None else list(split))
    last = count - 1
    return [
        StageLayers(
            number,
            count,
            tuple(layer < config.num_dense_layers for layer in its_layers),
            config.mtp_depths if number == last else 0,
            its_layers.start,
        )
        for number, its_layers in enumerate(layers)
    ]


def stage_weights(config: ModelConfig, stage: StageLayers) -> list[list[Weight]]:
    """Group a stage's weights as parallel/fsdp.py does: those outside of blocks, then block by block."""
    blocks = zip(stage.block_kinds, block_names(stage), strict=True)
    return [root_weights(config, stage), *(parameters.block(config, dense, name) for dense, name in blocks)]


def root_weights(config: ModelConfig, stage: StageLayers) -> list[Weight]:
    """Return a stage's weights outside of blocks.

    The last stage keeps a duplicate of the embedding for its MTP depths (docs/parallelism.md).
    """
    root: list[Weight] = []
    if stage.embeds:
        root += parameters.embedding(config)
    if stage.is_last:
        root += parameters.output(config)
    return root + [w for depth in range(stage.mtp_depths) for w in parameters.mtp_join(config, depth)]


def block_names(stage: StageLayers) -> list[str]:
    """Return the names of a stage's blocks, those of the MTP depths last."""
    layers = range(stage.first_layer, stage.first_layer + len(stage.dense))
    return [*map(parameters.layer_name, layers), *map(parameters.mtp_block_name, range(stage.mtp_depths))]
