"""Which layers are in which pipeline stage, which stages on which rank, and what a schedule asks for.

Plain integers, shared by the plan and by parallel/pipeline.py. The laws of the schedules are those of
torch.distributed.pipelining.schedules (torch 2.13); tests/planning/test_pipeline_stages.py holds them to it.


What each pipeline stage holds: its layers, and the embedding, head and MTP depths at the ends.
"""

from collections.abc import Sequence
from dataclasses import dataclass
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
    """Whether a rank holds one stage from the front and its mirror image from the back."""
    return schedule in _V_SHAPED


def splits_backward(schedule: Schedule) -> bool:
    """Whether gradients of inputs and of weights are computed apart, which forbids freeing parameters.

    Over FSDP2 with reshard_after_forward=True such a schedule gives wrong gradients and no error.
    """
    return is_v_shaped(schedule) or schedule is Schedule.InterleavedZeroBubble


def reshard_after_forward(config: ParallelConfig, pp: int) -> bool:
    """Whether gathered parameters are freed after the forward pass: as typed, else where it is right.

    Raises UserError where it was typed for a schedule that cannot do it.
    """
    kept = pp > 1 and splits_backward(config.schedule)
    if kept and config.reshard_after_forward:
        raise UserError(
            f"parallel.reshard_after_forward=true gives wrong gradients with parallel.schedule="
            f"{config.schedule.name} on pp={pp}: leave it out, or take GPipe, 1F1B or Interleaved1F1B"
        )
    return not kept if config.reshard_after_forward is None else config.reshard_after_forward


def stages_per_rank(schedule: Schedule, pipeline: PipelineConfig) -> int:
    """Virtual stages of a rank: as typed, else 1, or 2 where the schedule is made of several."""
    typed = pipeline.stages_per_rank
    if is_v_shaped(schedule):
        allowed, right = "exactly 2", typed in (None, 2)
    elif schedule in _INTERLEAVED:
        allowed, right = "2 or more", typed is None or typed >= 2
    else:
        allowed, right = "1 (Interleaved1F1B takes more)", typed in (None, 1)
    if not right:
        raise UserError(f"{PER_RANK}={typed}: parallel.schedule={schedule.name} takes {allowed}")
    return typed or (2 if is_v_shaped(schedule) or schedule in _INTERLEAVED else 1)


def stage_count(config: ParallelConfig, pp: int) -> int:
    """Stages of all ranks together; 1 without pipeline parallelism."""
    return 1 if pp == 1 else pp * stages_per_rank(config.schedule, config.pipeline or PipelineConfig())


def stages_of_rank(schedule: Schedule, rank: int, pp: int, per_rank: int) -> list[int]:
    """The stages on pipeline rank `rank` of `pp`, in order: every pp-th one, or the two arms of a V."""
    if is_v_shaped(schedule):
        return [rank, 2 * pp - 1 - rank]
    return [rank + n * pp for n in range(per_rank)]


def check_microbatches(
    schedule: Schedule, pp: int, per_rank: int, microbatches: int, sequences: int | None = None
) -> None:
    """Raise UserError where `schedule` cannot run `microbatches` a step over `pp` x `per_rank` stages.

    `sequences` is what one microbatch takes of the global batch, so that batch sizes can be named.
    """
    if takes_microbatches(schedule, pp, per_rank, microbatches):
        return
    near = [n for n in range(1, microbatches) if takes_microbatches(schedule, pp, per_rank, n)][-1:]
    above = range(microbatches + 1, microbatches + 2 * pp * per_rank + 1)
    near += [n for n in above if takes_microbatches(schedule, pp, per_rank, n)][:1]
    fix = f"microbatches that work: {_join(near)}"
    if sequences is not None:
        fix += f", by train.global_batch_size={_join([n * sequences for n in near])}"
    raise UserError(
        f"parallel.schedule={schedule.name} on {pp * per_rank} stages (pp={pp} x {per_rank}) cannot run "
        f"{microbatches} microbatches a step\n"
        f"{fix} or another train.microbatch_size"
    )


def takes_microbatches(schedule: Schedule, pp: int, per_rank: int, microbatches: int) -> bool:
    """Whether `schedule` runs with this many microbatches a step."""
    if microbatches < 1:
        return False
    if schedule in _INTERLEAVED:
        rounds = max(1, microbatches // pp)
        return microbatches % rounds == 0
    least = {Schedule["1F1B"]: pp, Schedule.DualPipeV: pp * per_rank}
    return microbatches >= least.get(schedule, 1)


def least_microbatches(schedule: Schedule, pp: int, per_rank: int) -> int:
    """The fewest microbatches a step that run and keep every rank busy for a time."""
    return pp * per_rank if schedule is Schedule.DualPipeV else pp


def split_layers(model: ModelConfig, stages: int, first_layers: list[int] | None = None) -> list[range]:
    """The main model's layers in each of `stages` stages, as `first_layers` says or balanced by cost.

    The largest stage is as small as it can be, then the sum of squares is; among equals the earlier
    stages have more layers. `first_layers` names the first layer of every stage but the first. Raises
    UserError where a stage would be without a layer.
    """
    if stages > model.num_layers:
        raise UserError(
            f"{stages} pipeline stages need a layer each, but model.num_layers={model.num_layers}: "
            f"lower parallel.degrees.pp or {PER_RANK} to {model.num_layers} stages or fewer"
        )
    bounds = _typed(model, stages, first_layers) if first_layers is not None else _balanced(model, stages)
    return [range(first, end) for first, end in pairwise(bounds)]


def layer_costs(model: ModelConfig) -> list[int]:
    """Matmul weights that a token meets in each layer of the main model."""
    return [parameters.active_matmul_parameters(layer, model) for layer in parameters.layers(model)]


def extra_costs(model: ModelConfig) -> tuple[int, int]:
    """The same for what the first stage has besides layers (a lookup) and the last (head, MTP depths)."""
    head = parameters.active_matmul_parameters(parameters.output(model), model)
    depths = sum(
        parameters.active_matmul_parameters(module, model) + head for module in parameters.mtp_modules(model)
    )
    return model.dim, head + depths


def _typed(model: ModelConfig, stages: int, first_layers: list[int]) -> list[int]:
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


def _balanced(model: ModelConfig, stages: int) -> list[int]:
    costs, (front, back) = layer_costs(model), extra_costs(model)
    sums = [front]
    for cost in costs:
        sums.append(sums[-1] + cost)
    sums[0], sums[-1] = 0, sums[-1] + back
    limit = _best(sums, stages, None)[0]
    return _best(sums, stages, limit)[1]


def _best(sums: list[int], stages: int, limit: int | None) -> tuple[int, list[int]]:
    """The best bounds of `stages` runs of the layers whose running cost is `sums`, and their score.

    The score is the largest run, or with a `limit` on it the sum of squares. Exact: from the back, for
    each number of stages and each first layer.
    """
    layers = len(sums) - 1
    tails: list[tuple[int, list[int]] | None] = [None] * layers + [(0, [layers])]
    for remaining in range(1, stages + 1):
        before, tails = tails, [None] * (layers + 1)
        for first in range(layers - remaining, -1, -1):
            for end in range(first + 1, layers - remaining + 2):
                cost, tail = sums[end] - sums[first], before[end]
                if tail is None or (limit is not None and cost > limit):
                    continue
                score = max(cost, tail[0]) if limit is None else cost * cost + tail[0]
                best = tails[first]
                if best is None or score <= best[0]:  # a later end wins: the earlier stage is larger
                    tails[first] = score, [first, *tail[1]]
    found = tails[0]
    assert found is not None
    return found


def _join(numbers: list[int]) -> str:
    return " or ".join(map(str, numbers))


@dataclass(frozen=True)
class Pipelining:
    """The schedule, the virtual stages of a rank and the user's split, as far as pp > 1 needs them."""

    schedule: Schedule = Schedule["1F1B"]
    per_rank: int = 1
    split: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Stage:
    """A pipeline stage: its number and count, its layers (True: dense), and what it holds besides."""

    index: int
    stages: int
    dense: tuple[bool, ...]
    mtp_depths: int

    @property
    def block_kinds(self) -> list[bool]:
        """Its layers and those of its MTP depths, which are never dense."""
        return [*self.dense, *[False] * self.mtp_depths]

    @property
    def is_first(self) -> bool:
        """Whether it holds the embedding."""
        return self.index == 0

    @property
    def is_last(self) -> bool:
        """Whether it holds the head."""
        return self.index == self.stages - 1

    @property
    def embeds(self) -> int:
        """How often a microbatch is looked up in its embedding: for the first layer and each MTP depth."""
        return int(self.is_first) + self.mtp_depths

    @property
    def predictions(self) -> int:
        """How often a microbatch passes its head."""
        return int(self.is_last) * (1 + self.mtp_depths)


def stages(config: ModelConfig, count: int, split: Sequence[int] | None = None) -> list[Stage]:
    """The stages of all ranks in order, balanced or with the first layers that `split` names."""
    layers = split_layers(config, count, None if split is None else list(split))
    last = count - 1
    return [
        Stage(
            number,
            count,
            tuple(layer < config.num_dense_layers for layer in its_layers),
            config.mtp_depths if number == last else 0,
        )
        for number, its_layers in enumerate(layers)
    ]


def stage_groups(config: ModelConfig, stage: Stage) -> list[list[Weight]]:
    """A stage's weights as parallel/fsdp.py groups them: first what belongs to no block, then the blocks.

    The last stage keeps a copy of the embedding for its MTP depths (DESIGN section 7).
    """
    root: list[Weight] = []
    if stage.embeds:
        root += parameters.embedding(config)
    if stage.is_last:
        root += parameters.output(config)
    root += stage.mtp_depths * parameters.mtp_join(config)
    return [root, *(parameters.block(config, dense) for dense in stage.block_kinds)]
