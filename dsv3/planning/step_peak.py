"""The moment of a training step at which a rank holds the most, besides its state.

Candidates are the end of the forward pass, where the head computes, the backward pass of the last norm, and
that of each kind of layer, with what the layers before it have saved. Activations and copies of weights are
those of one moment: the largest of each are not there together.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from dsv3.config.model import ModelConfig
from dsv3.config.parallel import RecomputeMode, Schedule
from dsv3.planning.activations import Activations, TokenBytes
from dsv3.planning.group_bytes import GroupBytes, bytes_of, stage_bytes
from dsv3.planning.layout import ParallelDims
from dsv3.planning.parameters import Component, Weight
from dsv3.planning.pipeline_schedules import most_held, most_waiting
from dsv3.planning.pipeline_stages import StageLayers, root_weights, stage_weights
from dsv3.planning.sharding import FP32, is_used_in_fp32, local_numel, uses_fp8_matmul
from dsv3.planning.step_shape import StepShape
from dsv3.planning.working_memory import Phase, backward_phases, head_chunk, head_weight_gradient

SPLIT_BACKWARD = (Schedule.ZBVZeroBubble, Schedule.DualPipeV)
"""Schedules that compute gradients of weights apart from those of inputs."""

GATHERED_BLOCKS = 2
"""FSDP2 gathers the next block while it computes the current one."""


@dataclass(frozen=True)
class Moment:
    """Bytes that live at a moment of a step, besides parameters, gradients and optimizer state."""

    activations: int
    """Activations, saved or in work, and their gradients."""
    copies: int
    """Weights gathered or cast, and gradients of weights on their way to the state."""
    late: int = 0
    """Gradients of the state that come after this moment; before their first use a step has none."""

    @property
    def total(self) -> int:
        """Bytes of the first two, without what is not there yet of the state."""
        return self.activations + self.copies - self.late


def step_peak(
    config: ModelConfig, degrees: ParallelDims, shape: StepShape, rank: int, stages: list[StageLayers]
) -> Moment:
    """Return the fullest moment of a step on pipeline rank `rank`, which holds `stages`."""
    if degrees.world_size == 1:
        moments = _OneProcess(config, degrees, shape, stages).moments()
    elif degrees.pp == 1:
        moments = _Sharded(config, degrees, shape, stages).moments()
    else:
        moments = _Pipelined(config, degrees, shape, stages).moments_of(rank)
    return max(moments, key=lambda moment: moment.total)


def fullest_ranks(
    config: ModelConfig, degrees: ParallelDims, shape: StepShape, held: list[list[StageLayers]]
) -> list[int]:
    """Return ranks of which one is the fullest: of those with alike stages the one with most in flight."""
    if degrees.pp == 1 or shape.state.frozen:
        return list(range(degrees.pp))
    step = _Pipelined(config, degrees, shape, [stage for stages in held for stage in stages])
    alike: dict[object, int] = {}
    fullest: dict[object, tuple[int, int]] = {}
    for rank, stages in enumerate(held):
        kinds = [stage.kind for stage in stages]
        for kind, stage in zip(kinds, stages, strict=True):
            if kind not in alike:
                alike[kind] = step.per_microbatch(stage)
        each = {stage.index: alike[kind] for kind, stage in zip(kinds, stages, strict=True)}
        flying = most_in_flight(degrees, shape, rank, each, {s.index: step.due(s) for s in stages})
        fullest[tuple(kinds)] = max(fullest.get(tuple(kinds), (flying, rank)), (flying, rank))
    return sorted(rank for _, rank in fullest.values())


class _Step:
    """The common part of a step's moments on every layout."""

    def __init__(
        self, config: ModelConfig, degrees: ParallelDims, shape: StepShape, stages: list[StageLayers]
    ) -> None:
        self.config, self.degrees, self.shape, self.stages = config, degrees, shape, stages
        self.compute = shape.state.compute
        self.saved = Activations(config, self.compute, shape.fused_kernels, degrees, shape.ranks_per_node)
        self.tokens = shape.tokens(degrees)
        self.recomputes = shape.recompute is not RecomputeMode.none
        self._kept: dict[bool, TokenBytes] = {}
        self._groups: dict[object, list[GroupBytes]] = {}

    def on_rank(self, bytes_: TokenBytes) -> int:
        """Return the bytes of a microbatch."""
        return bytes_.on_rank(self.tokens, self.degrees.tp)

    def kept(self, dense: bool) -> TokenBytes:
        """Return what a layer keeps from its forward to its backward pass."""
        if dense not in self._kept:
            if not self.recomputes:
                self._kept[dense] = self.saved.block(dense)
            elif self.shape.recompute is RecomputeMode.full:
                self._kept[dense] = self.saved.block_input()
            else:
                self._kept[dense] = self.saved.selective(dense, self.shape.keep)
        return self._kept[dense]

    def in_backward(self, dense: bool) -> TokenBytes:
        """Return what a layer holds at the start of its backward pass: recomputed, its input besides."""
        return self.saved.block(dense) + (self.saved.block_input() if self.recomputes else TokenBytes(0))

    def trained(self, group: list[Weight]) -> int:
        """Count the elements of a group that have a gradient, as a rank computes with them."""
        return sum(local_numel(weight, self.degrees) for weight in group if self.shape.state.trains(weight))

    def head(self) -> int:
        """Count the elements of the head's weight that have a gradient."""
        last = next(stage for stage in self.stages if stage.is_last)
        root = root_weights(self.config, last)
        return self.trained([weight for weight in root if weight.component is Component.head])

    def late(self, gradients: int) -> int:
        """Return the bytes of `gradients` that are missing still: those of a step with one microbatch."""
        return gradients if self.shape.microbatches == 1 else 0

    def in_last_norm(self, kept: int, copies: int, late: int) -> Moment:
        """Return the moment at which the norm before the head holds its gradients in fp32."""
        values = 2 if self.shape.fused_kernels else 4
        arrived = self.compute  # counted with what is kept
        kept += self.on_rank(TokenBytes((values * FP32 - arrived) * self.config.dim))
        return Moment(kept, copies, late)

    def in_head(self, kept: int, copies: int, late: int) -> Moment:
        """Return the moment at which the head computes its last chunk, beside what is kept."""
        ids = -(-self.config.vocab_size // self.degrees.tp)
        predictions = 1 + self.config.mtp_depths
        # The hidden states that it predicts from, of the tokens of all tp ranks.
        hidden = self.tokens * predictions * self.compute * self.config.dim
        working = hidden + head_chunk(self.tokens, ids, self.compute)
        return Moment(kept + working, copies + head_weight_gradient(self.head(), self.compute), late)


class _OneProcess(_Step):
    """One process gathers nothing, but a weight that is cast where it is used stays for the backward pass."""

    def moments(self) -> Iterator[Moment]:
        """Yield the moments: the backward pass of the last layer of each run of equal ones, and the head."""
        (stage,) = self.stages
        root, *blocks = stage_weights(self.config, stage)
        kinds, layers = stage.block_kinds, len(stage.dense)
        joins = [w for w in root if w.component is Component.mtp_projection]
        kept = casts = 0
        # What MTP looks up gives the embedding's gradient early. It waits for that of the first layer.
        waiting = self.trained([w for w in root if w.component is Component.embedding]) * FP32
        gradient = self.shape.state.gradient
        missing = self.trained([w for w in root if w.component is not Component.head]) * gradient
        for number, (dense, block) in enumerate(zip(kinds, blocks, strict=True)):
            if number >= layers:  # an MTP depth, after the prediction before it
                kept += self.on_rank(self.saved.prediction() + self.saved.mtp_join())
                casts += self._cast(joins[number - layers : number - layers + 1])
            own = self._cast(block)
            missing += self.trained(block) * gradient
            if number + 1 in (layers, len(kinds)) or kinds[number + 1] != dense:
                early = waiting if number < layers < len(kinds) else 0
                yield from self._in_block(dense, block, kept, casts + own + early, self.late(missing))
            kept += self.on_rank(self.kept(dense))
            casts += 0 if self.recomputes else own
        head = [w for w in root if w.component is Component.head]
        kept += self.on_rank(self.saved.prediction())
        # The head hands its weight's gradient over when the backward pass begins.
        late = self.late(missing + self.trained(head) * gradient)
        yield self.in_head(kept, casts + self._cast(head), late)
        yield self.in_last_norm(kept, casts, self.late(missing))
        yield Moment(0, 0)  # the optimizer's step

    def _in_block(
        self, dense: bool, block: list[Weight], kept: int, casts: int, late: int
    ) -> Iterator[Moment]:
        casts_gradients = self.compute < FP32 and self.shape.fp8 is None
        own = kept + self.on_rank(self.in_backward(dense))
        trained = self.trained(block)
        for phase in backward_phases(self.saved, dense, casts_gradients, self.recomputes):
            used = phase.used_casts * self.compute if casts_gradients else 0
            gradients = phase.gradients if trained else 0
            yield Moment(own + self.on_rank(phase.activations), casts - used + gradients, late)

    def _cast(self, weights: list[Weight]) -> int:
        """Return the bytes of the casts that the matmuls of `weights` save."""
        if self.compute == self.shape.state.parameter:
            return 0
        # FP8 matmuls save the master weight and quantize it again.
        in_fp8 = self.shape.fp8 is not None
        cast = [
            w for w in weights
            if w.is_matrix and not is_used_in_fp32(w) and not (in_fp8 and uses_fp8_matmul(w))
        ]  # fmt: skip
        return sum(weight.numel for weight in cast) * self.compute


class _Gathered(_Step):
    """FSDP gathers weights in the dtype that they are used in, and reduces gradients in fp32."""

    def groups_of(self, stage: StageLayers) -> list[GroupBytes]:
        """Return the bytes of a stage's root, then those of each block."""
        state = self.shape.state
        kind = stage.index if state.frozen else stage.kind  # names tell what is frozen
        if kind not in self._groups:
            self._groups[kind] = stage_bytes(
                self.config, stage, self.degrees, state, self.shape.gathers_in_fp8
            )
        return self._groups[kind]

    def arrived(self, phase: Phase, dense: bool, block: GroupBytes) -> int:
        """Count the elements of a feed-forward's weights whose gradients have come by the end of `phase`."""
        elements = phase.used_casts + phase.gradients // FP32
        return min(block.trained, elements // (self.degrees.tp if dense else self.degrees.ep))


class _Sharded(_Gathered):
    """FSDP without pipeline stages: two blocks are gathered at once, one block's gradients are reduced."""

    def moments(self) -> Iterator[Moment]:
        """Yield the moments: the last layer of each kind, the head, and the root's gradients at the end."""
        (stage,) = self.stages
        outside, *blocks = self.groups_of(stage)
        root = root_weights(self.config, stage)
        sizes = sorted((block.gathered for block in blocks), reverse=True)
        gathered = outside.gathered
        gathered += sum(sizes[:GATHERED_BLOCKS] if self.shape.reshard_after_forward else sizes)
        kinds, layers = stage.block_kinds, len(stage.dense)
        kept, missing = 0, outside.gradients
        for number, (dense, block) in enumerate(zip(kinds, blocks, strict=True)):
            if number >= layers:
                kept += self.on_rank(self.saved.prediction() + self.saved.mtp_join())
            missing += block.gradients
            if number + 1 in (layers, len(kinds)) or kinds[number + 1] != dense:
                of_root = self._held_by_root(root)
                yield from self._in_block(dense, block, kept, gathered, of_root, self.late(missing))
            kept += self.on_rank(self.kept(dense))
        kept += self.on_rank(self.saved.prediction())
        yield self.in_head(kept, gathered, self.late(missing))
        # No layer has begun its backward pass: of the root's gradients only the head's is there.
        of_head = self.head() * self.compute if self.degrees.tp == 1 else 0
        yield self.in_last_norm(kept, gathered + of_head, self.late(missing))
        # The root's gradients are reduced after the last layer. tp makes embedding and head their own groups.
        ends = [outside]
        if self.degrees.tp > 1:
            ends = [bytes_of([w], self.degrees, self.shape.state, self.shape.gathers_in_fp8) for w in root]
        yield Moment(0, outside.gathered + max(end.in_reduction(self.compute) for end in ends))

    def _in_block(
        self, dense: bool, block: GroupBytes, kept: int, gathered: int, of_root: int, late: int
    ) -> Iterator[Moment]:
        """Yield the moments of a layer's backward pass; its experts are a group that is reduced first."""
        kept += self.on_rank(self.in_backward(dense))
        copies = gathered + of_root
        *phases, attention = backward_phases(self.saved, dense, casts=False, recomputed=self.recomputes)
        arrived = [self.arrived(phase, dense, block) for phase in phases]
        experts = 0 if dense else arrived[-1]
        others = block.trained - experts
        # Before its gradients are reduced, a group's gathered weights are freed.
        freed = 1 if self.shape.gathers_in_fp8 else self.compute
        # What is reduced stays until the next group's reduction: at first that of the layer after this one.
        waiting = [others * FP32 + count * self.compute for count in arrived]
        if not dense:
            waiting[-1] = experts * (FP32 + self.compute - freed)
            if not self.recomputes:  # the end of its forward pass is before every backward pass
                waiting[0] = -of_root
        for phase, gradients in zip(phases, waiting, strict=True):
            yield Moment(kept + self.on_rank(phase.activations), copies + gradients, late)
        gradients = experts * (FP32 - freed) + others * self.compute
        yield Moment(kept + self.on_rank(attention.activations), copies + gradients, late)
        yield Moment(
            kept - self.on_rank(self.in_backward(dense)), copies + others * (FP32 + self.compute), late
        )

    def _held_by_root(self, root: list[Weight]) -> int:
        """Return the bytes of the root's gradients that wait, unsharded, for the end of the backward pass."""
        if self.degrees.tp > 1:
            return 0
        used = (Component.head, Component.embedding) if self.config.mtp_depths else (Component.head,)
        return self.trained([w for w in root if w.component in used]) * self.compute


class _Pipelined(_Gathered):
    """Pipeline stages keep gathered weights and unsharded fp32 gradients until the last microbatch."""

    def moments_of(self, rank: int) -> Iterator[Moment]:
        """Yield the moments of pipeline rank `rank`: a layer's backward pass, or the head, at the fullest."""
        shape, boundary = self.shape, self.on_rank(self.saved.block_input())
        each = {stage.index: self.per_microbatch(stage) for stage in self.stages}
        due = {stage.index: self.due(stage) for stage in self.stages}
        kept = most_in_flight(self.degrees, shape, rank, each, due)
        # torch's stages receive every microbatch's input and gradient in a buffer of its own.
        buffers = sum(1 + (not stage.is_first) - stage.is_last for stage in self.stages)
        ends = buffers * boundary * shape.microbatches
        kept += ends
        groups = [group for stage in self.stages for group in self.groups_of(stage)]
        held = sum(group.gathered + group.trained * FP32 for group in groups)
        shards = sum(group.gradients for group in groups)
        for stage in self.stages:
            for dense, group in dict(zip(stage.block_kinds, self.groups_of(stage)[1:], strict=True)).items():
                # What the layer itself keeps is among what is in flight.
                own = self.on_rank(self.kept(dense)) + self._done_in_head(stage)
                yield from self._in_block(dense, group, kept - own, held, shards)
        for stage in self.stages:
            # A stage's gradients are reduced when its last microbatch is through: others may be in flight.
            left = most_in_flight(self.degrees, shape, rank, each | {stage.index: 0}, due) + ends
            more = max(group.trained * FP32 - group.gathered for group in self.groups_of(stage))
            yield Moment(left, held + more, shards)
        if any(stage.is_last for stage in self.stages):
            yield self.in_head(kept, held, shards)
            yield self.in_last_norm(kept, held, shards)

    def _in_block(
        self, dense: bool, block: GroupBytes, kept: int, copies: int, late: int
    ) -> Iterator[Moment]:
        """Yield the moments of a layer's backward pass, with its weights' gradients as they come."""
        own = kept + self.on_rank(self.in_backward(dense))
        *phases, attention = backward_phases(self.saved, dense, casts=False, recomputed=self.recomputes)
        for phase in phases:
            arrived = self.arrived(phase, dense, block)
            if self.compute == FP32:  # each is added at once; else a group's wait for its end
                arrived = min(arrived, phase.gradients // FP32)
            if self.shape.pipelining.schedule in SPLIT_BACKWARD:
                arrived = block.trained  # a stage's come in one pass, and wait for the next one
            yield Moment(own + self.on_rank(phase.activations), copies + arrived * self.compute, late)
        own += self.on_rank(attention.activations)
        yield Moment(own, copies + block.trained * self.compute, late)

    def _done_in_head(self, stage: StageLayers) -> int:
        """Return what a microbatch of the last stage has freed when the layers' backward pass begins."""
        if not stage.is_last:
            return 0
        # In the compute dtype the gradient of the head's weight waits for the end of the backward pass.
        added = self.head() * FP32 if self.compute == FP32 else 0
        return self.on_rank(self.saved.prediction()) + added

    def due(self, stage: StageLayers) -> int:
        """Return what a microbatch holds in a stage between the halves of a split backward pass."""
        return sum(self.on_rank(self.saved.weight_gradients_due(dense)) for dense in stage.block_kinds)

    def per_microbatch(self, stage: StageLayers) -> int:
        """Return what a microbatch keeps in a stage from its forward to its backward pass."""
        kept = TokenBytes(0)
        for dense in stage.block_kinds:
            kept += self.kept(dense)
        for _ in range(stage.predictions):
            kept += self.saved.prediction()
        for _ in range(stage.mtp_depths):
            kept += self.saved.mtp_join()
        # The head hands over its weight's gradient in the backward pass.
        return self.on_rank(kept) + (self.head() * self.compute if stage.is_last else 0)


def most_in_flight(
    degrees: ParallelDims,
    shape: StepShape,
    rank: int,
    each: dict[int, int],
    due: dict[int, int] | None = None,
) -> int:
    """Return the most bytes at once, if a microbatch keeps `each` stage's bytes from forward to backward.

    Where the schedule splits backward passes, it keeps `due` besides from the first half to the second.
    """
    p = shape.pipelining
    if due is not None and p.schedule in SPLIT_BACKWARD:
        moments = most_waiting(p.schedule, rank, degrees.pp, p.per_rank, shape.microbatches)
        return max(sum(each[s] * held + due[s] * waiting for s, held, waiting in at) for at in moments)
    counts = most_held(p.schedule, rank, degrees.pp, p.per_rank, shape.microbatches)
    return max(sum(each[stage] * count for stage, count in held) for held in counts)
