"""The moment of a training step at which a rank holds the most, besides its state.

Candidates are the end of the forward pass, where the head computes, the backward pass of the last norm, and
that of each kind of layer, with what the layers before it have saved. Activations and copies of weights are
those of one moment: the largest of each are not there together.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from dsv3.config.model import ModelConfig
from dsv3.config.parallel import RecomputeMode
from dsv3.planning.activations import Activations, TokenBytes
from dsv3.planning.layout import ParallelDims
from dsv3.planning.parameters import Component, Weight
from dsv3.planning.pipeline_schedules import schedule_actions
from dsv3.planning.pipeline_stages import StageLayers, stage_weights
from dsv3.planning.sharding import FP32, gathered_bytes, is_used_in_fp32, local_numel, uses_fp8_matmul
from dsv3.planning.step_shape import StepShape
from dsv3.planning.working_memory import backward_phases, head_chunk, head_weight_gradient

GATHERED_BLOCKS = 2
"""FSDP2 gathers the next block while it computes the current one."""


@dataclass(frozen=True)
class Moment:
    """Bytes that live at a moment of a step, besides parameters, gradients and optimizer state."""

    activations: int
    """Activations, saved or in work, and their gradients."""
    copies: int
    """Weights gathered or cast, and gradients of weights on their way to the state."""

    @property
    def total(self) -> int:
        """Bytes of both."""
        return self.activations + self.copies


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
        self.groups = [stage_weights(config, stage) for stage in stages]
        """Per stage the root's weights, then those of each block."""

    def on_rank(self, bytes_: TokenBytes) -> int:
        """Return the bytes of a microbatch."""
        return bytes_.on_rank(self.tokens, self.degrees.tp)

    def kept(self, dense: bool) -> TokenBytes:
        """Return what a layer keeps from its forward to its backward pass."""
        if not self.recomputes:
            return self.saved.block(dense)
        if self.shape.recompute is RecomputeMode.full:
            return self.saved.block_input()
        return self.saved.selective(dense, self.shape.keep)

    def in_backward(self, dense: bool) -> TokenBytes:
        """Return what a layer holds at the start of its backward pass: recomputed, its input besides."""
        return self.saved.block(dense) + (self.saved.block_input() if self.recomputes else TokenBytes(0))

    def trained(self, group: list[Weight]) -> int:
        """Count the elements of a group that have a gradient, as a rank computes with them."""
        return sum(local_numel(weight, self.degrees) for weight in group if self.shape.state.trains(weight))

    def head(self) -> int:
        """Count the elements of the head's weight that have a gradient."""
        stage = self.groups[[stage.is_last for stage in self.stages].index(True)]
        return self.trained([weight for weight in stage[0] if weight.component is Component.head])

    def in_last_norm(self, kept: int, copies: int) -> Moment:
        """Return the moment at which the norm before the head holds its gradients in fp32."""
        values = 2 if self.shape.fused_kernels else 4
        arrived = self.compute  # counted with what is kept
        return Moment(kept + self.on_rank(TokenBytes((values * FP32 - arrived) * self.config.dim)), copies)

    def in_head(self, kept: int, copies: int) -> Moment:
        """Return the moment at which the head computes its last chunk, beside what is kept."""
        ids = -(-self.config.vocab_size // self.degrees.tp)
        predictions = 1 + self.config.mtp_depths
        # The hidden states that it predicts from, of the tokens of all tp ranks.
        hidden = self.tokens * predictions * self.compute * self.config.dim
        working = hidden + head_chunk(self.tokens, ids, self.compute)
        return Moment(kept + working, copies + head_weight_gradient(self.head(), self.compute))


class _OneProcess(_Step):
    """One process gathers nothing, but a weight that is cast where it is used stays for the backward pass."""

    def moments(self) -> Iterator[Moment]:
        """Yield the moments: the backward pass of the last layer of each run of equal ones, and the head."""
        (stage,), ((root, *blocks),) = self.stages, self.groups
        kinds, layers = stage.block_kinds, len(stage.dense)
        joins = [w for w in root if w.component is Component.mtp_projection]
        kept = casts = 0
        # What MTP looks up gives the embedding's gradient early. It waits for that of the first layer.
        waiting = self.trained([w for w in root if w.component is Component.embedding]) * FP32
        for number, (dense, block) in enumerate(zip(kinds, blocks, strict=True)):
            if number >= layers:  # an MTP depth, after the prediction before it
                kept += self.on_rank(self.saved.prediction() + self.saved.mtp_join())
                casts += self._cast(joins[number - layers : number - layers + 1])
            own = self._cast(block)
            if number + 1 in (layers, len(kinds)) or kinds[number + 1] != dense:
                early = waiting if number < layers < len(kinds) else 0
                yield from self._in_block(dense, block, kept, casts + own + early)
            kept += self.on_rank(self.kept(dense))
            casts += 0 if self.recomputes else own
        head = [w for w in root if w.component is Component.head]
        kept += self.on_rank(self.saved.prediction())
        yield self.in_head(kept, casts + self._cast(head))
        yield self.in_last_norm(kept, casts)

    def _in_block(self, dense: bool, block: list[Weight], kept: int, casts: int) -> Iterator[Moment]:
        casts_gradients = self.compute < FP32 and self.shape.fp8 is None
        own = kept + self.on_rank(self.in_backward(dense))
        trained = self.trained(block)
        for phase in backward_phases(self.saved, dense, casts_gradients, self.recomputes):
            used = phase.used_casts * self.compute if casts_gradients else 0
            gradients = phase.gradients if trained else 0
            yield Moment(own + self.on_rank(phase.activations), casts - used + gradients)

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

    def gathered(self, group: list[Weight]) -> int:
        """Return the bytes of a group's gathered weights."""
        in_fp8 = self.shape.gathers_in_fp8
        return sum(gathered_bytes(weight, self.degrees, self.compute, in_fp8) for weight in group)

    def in_reduction(self, group: list[Weight]) -> int:
        """Return the bytes of a group's gradients in the dtype they come in and in fp32, as it is reduced."""
        return self.trained(group) * (FP32 + self.compute)

    def in_block(self, dense: bool, kept: int, copies: int) -> Iterator[Moment]:
        """Yield the moments of a layer's backward pass, beside what is kept by others."""
        own = kept + self.on_rank(self.in_backward(dense))
        for phase in backward_phases(self.saved, dense, casts=False, recomputed=self.recomputes):
            yield Moment(own + self.on_rank(phase.activations), copies)


class _Sharded(_Gathered):
    """FSDP without pipeline stages: two blocks are gathered at once, one block's gradients are reduced."""

    def moments(self) -> Iterator[Moment]:
        """Yield the moments: the last layer of each kind, the head, and the root's gradients at the end."""
        (stage,), ((root, *blocks),) = self.stages, self.groups
        sizes = sorted(map(self.gathered, blocks), reverse=True)
        gathered = self.gathered(root)
        gathered += sum(sizes[:GATHERED_BLOCKS] if self.shape.reshard_after_forward else sizes)
        kinds, layers = stage.block_kinds, len(stage.dense)
        reduced = max(map(self.in_reduction, blocks))
        kept = 0
        for number, dense in enumerate(kinds):
            if number >= layers:
                kept += self.on_rank(self.saved.prediction() + self.saved.mtp_join())
            if number + 1 in (layers, len(kinds)) or kinds[number + 1] != dense:
                yield from self.in_block(dense, kept, gathered + reduced + self._held_by_root(root))
            kept += self.on_rank(self.kept(dense))
        kept += self.on_rank(self.saved.prediction())
        yield self.in_head(kept, gathered)
        yield self.in_last_norm(kept, gathered + self._held_by_root(root))
        # The root's gradients are reduced after the last layer. tp makes embedding and head their own groups.
        ends = [[weight] for weight in root] if self.degrees.tp > 1 else [root]
        yield Moment(0, self.gathered(root) + max(map(self.in_reduction, ends)))

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
        each = {stage.index: self._per_microbatch(stage) for stage in self.stages}
        kept = most_in_flight(self.degrees, shape, rank, each)
        # torch's stages receive every microbatch's input and gradient in a buffer of its own.
        ends = sum(1 + (not stage.is_first) - stage.is_last for stage in self.stages)
        kept += ends * boundary * shape.microbatches
        groups = [group for stage in self.groups for group in stage]
        held = sum(self.gathered(group) + self.trained(group) * FP32 for group in groups)
        reduced = max(map(self.in_reduction, groups))
        for dense in {dense for stage in self.stages for dense in stage.block_kinds}:
            # What the layer itself keeps is among what is in flight.
            others = kept - self.on_rank(self.kept(dense))
            yield from self.in_block(dense, others, held + reduced)
        if any(stage.is_last for stage in self.stages):
            yield self.in_head(kept, held)
            yield self.in_last_norm(kept, held)

    def _per_microbatch(self, stage: StageLayers) -> int:
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


def most_in_flight(degrees: ParallelDims, shape: StepShape, rank: int, each: dict[int, int]) -> int:
    """Return the most bytes at once, if a microbatch keeps `each` stage's bytes from forward to backward."""
    p, now, most = shape.pipelining, 0, 0
    for action in schedule_actions(p.schedule, rank, degrees.pp, p.per_rank, shape.microbatches):
        if action.kind == "F":
            now += each[action.stage]
            most = max(most, now)
        elif action.kind != "I":
            now -= each[action.stage]
    return most
