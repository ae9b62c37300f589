"""The operators of a layer with the shapes that a rank computes: their FLOPs and the bytes that they move.

A matmul has the rows, columns and depth that are left after tensor and expert parallelism; the experts' one
is grouped, with as many rows per expert as an even load gives. Every other operator is bound by memory and
counts the bytes that it reads and writes. `c` is the bytes per value of the compute dtype.

torch.compile and fused kernels read each input and write each output once; eager PyTorch passes over some
values several times. Shapes: T tokens of a microbatch on the ranks of one tp group, R of those on one rank.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple

from dsv3.config.model import ModelConfig
from dsv3.config.parallel import DispatchBackend, SavedOp
from dsv3.planning.layout import ParallelDims
from dsv3.planning.sharding import FP8_BLOCK, FP32
from dsv3.planning.step_shape import StepShape

ROWS = 128
"""Rows of the tiles of a grouped matmul on a GPU: the last tile of each expert is computed whole."""

QUERIES = 128
"""Queries per block of attention on a CPU (model/cpu_attention.py)."""


class Kind(Enum):
    """The kind of an operator, after which its rate is named."""

    matmul = "matmul"
    matmul_fp8 = "matmul_fp8"
    grouped = "grouped"
    grouped_fp8 = "grouped_fp8"
    attention = "attention"
    attention_backward = "attention_backward"
    exact = "exact"
    """A matmul in fp32 whatever the precision: the router's."""
    memory = "memory"


class Work(NamedTuple):
    """Work of one operator in one pass."""

    kind: Kind
    flops: float
    bytes: float
    kernels: float
    saved: SavedOp | None = None
    """The name under which selective activation checkpointing may keep its result."""


@dataclass(frozen=True)
class Passes:
    """The work of a layer's forward pass, and of the two halves of its backward pass."""

    forward: list[Work]
    inputs: list[Work]
    """Gradients of the inputs."""
    weights: list[Work]
    """Gradients of the weights, and adding them to those of earlier microbatches."""


class Operators:
    """The operators of a model's layers on one rank of a layout."""

    def __init__(self, config: ModelConfig, degrees: ParallelDims, shape: StepShape) -> None:
        self.config, self.degrees, self.shape = config, degrees, shape
        self.c = shape.state.compute
        self.tokens = shape.tokens(degrees)
        self.rows = self.tokens / degrees.tp
        self.fp8 = shape.fp8 is not None

    def layer(self, dense: bool) -> Passes:
        """Return the work of a layer with its norms and residual sums."""
        passes = Passes([], [], [])
        self._attention(passes)
        (self._dense if dense else self._moe)(passes)
        # Two norms and two residual sums on the rank's own rows.
        self._norm(passes, self.rows * self.config.dim, 2)
        self._memory(passes, 2 * self.rows * self.config.dim, 3 * self.c, 3 * self.c, kernels=2, backward=1)
        return passes

    def head(self) -> Passes:
        """Return the work of one prediction: norm, head and loss, with gradients (model/head.py)."""
        c, columns = self.c, self.config.vocab_size / self.degrees.tp
        whole = Passes([], [], [])
        self._norm(whole, self.rows * self.config.dim, 1)
        self._matmul(whole, self.tokens, columns, self.config.dim, in_fp8=False)
        # Logits in fp32: largest, sum of exponentials, gradient, and the cast that the matmuls read.
        self._memory(whole, self.tokens * columns, 8 + c, 5 * FP32 + 2 * c, kernels=8, backward=0)
        return Passes([*whole.forward, *whole.inputs, *whole.weights], [], [])

    def scores(self) -> list[Work]:
        """Return the work of one prediction without gradients."""
        c, columns = self.c, self.config.vocab_size / self.degrees.tp
        whole = Passes([], [], [])
        self._norm(whole, self.rows * self.config.dim, 1)
        self._matmul(whole, self.tokens, columns, self.config.dim, in_fp8=False)
        self._memory(whole, self.tokens * columns, FP32 + c, 3 * FP32 + c, kernels=6)
        return whole.forward

    def embedding(self) -> Passes:
        """Return the work of one lookup, and of adding its gradient."""
        passes = Passes([], [], [])
        self._memory(passes, self.rows * self.config.dim, 2 * self.c, 2 * self.c, kernels=2)
        return passes

    def mtp_join(self) -> Passes:
        """Return the work of an MTP depth besides its layer and prediction: norms and projection."""
        passes = Passes([], [], [])
        self._norm(passes, self.rows * self.config.dim, 2)
        self._matmul(passes, self.rows, self.config.dim, 2 * self.config.dim)
        return passes

    def _attention(self, passes: Passes) -> None:
        a, d, shape = self.config.attention, self.degrees, self.shape
        heads, dim = a.heads / d.tp, self.config.dim
        latents = a.kv_lora_rank + a.qk_rope_head_dim
        if a.q_lora_rank is None:
            self._matmul(passes, self.tokens, heads * a.qk_head_dim, dim)
        else:
            self._matmul(passes, self.rows, a.q_lora_rank, dim)
            self._norm(passes, self.rows * a.q_lora_rank, 1)
            self._matmul(passes, self.tokens, heads * a.qk_head_dim, a.q_lora_rank)
        self._matmul(passes, self.rows, latents, dim)
        self._norm(passes, self.rows * a.kv_lora_rank, 1)
        # The rank with the last part of a sequence expands the keys and values of all of it.
        keys = self.tokens * d.cp
        self._matmul(passes, keys, heads * (a.qk_nope_head_dim + a.v_head_dim), a.kv_lora_rank)
        # RoPE and the join of the parts without and with rotation, for queries and for keys.
        self._memory(
            passes,
            (self.tokens + keys) * heads * a.qk_head_dim,
            2 * self.c,
            3 * self.c + 2,
            kernels=14,
            backward=1,
        )
        rows, length, widths = shape.microbatch_size, shape.sequence_length, (a.qk_head_dim, a.v_head_dim)
        forward, backward = attention_work(heads, rows, length, widths, self.c, shape.fused_kernels, d.cp)
        passes.forward.append(forward)
        passes.inputs.append(backward)
        self._matmul(passes, self.tokens, dim, heads * a.v_head_dim)

    def _dense(self, passes: Passes) -> None:
        hidden = self.config.dense_hidden_dim / self.degrees.tp
        self._feed_forward(passes, self.tokens, hidden)

    def _moe(self, passes: Passes) -> None:
        moe, dim, c, rows = self.config.moe, self.config.dim, self.c, self.rows
        if moe.num_shared_experts:
            self._feed_forward(passes, rows, moe.num_shared_experts * moe.hidden_dim)
            self._memory(passes, rows * dim, 3 * c, 3 * c, kernels=1)
        # The router in fp32, its scores, groups, choice and weights.
        flops, fused = 2 * rows * dim * moe.num_experts, self.shape.fused_operators
        for part in (passes.forward, passes.inputs, passes.weights):
            part.append(Work(Kind.matmul if fused else Kind.exact, flops, rows * dim * FP32, 1))
        self._memory(passes, rows * dim, c + FP32, c + FP32, kernels=1)
        self._memory(passes, rows * moe.num_experts, 6 * FP32, 20 * FP32, kernels=25, backward=0.5)
        experts = moe.num_experts / self.degrees.ep
        chosen = rows * moe.top_k
        per_expert = chosen / experts
        in_tiles = self.shape.fused_kernels and per_expert > ROWS // 8
        padded = -(-per_expert // ROWS) * ROWS * experts if in_tiles else chosen
        self._matmul(passes, padded, 2 * moe.hidden_dim, dim, experts)
        self._memory(passes, chosen * moe.hidden_dim, 3 * c, 5 * c, kernels=2, backward=5 / 3)
        self._matmul(passes, padded, dim, moe.hidden_dim, experts)
        # Rows are copied into the order of ranks before an exchange, and into that of experts after it;
        # DeepEP's kernels read and write tokens in place.
        levels = self.shape.dispatch_levels(moe, self.degrees)
        copies: float = moe.top_k
        if self.shape.dispatch is DispatchBackend.all_to_all:
            copies += sum(level.rows for level in levels)
        # The way back sums the copies of a row, and each way is the other's gradient.
        launched = 12 + 10 * len(levels)
        self._memory(passes, 2 * copies * rows * dim, 1.75 * c, 3 * c, kernels=launched, backward=1)

    def _feed_forward(self, passes: Passes, rows: float, hidden: float) -> None:
        together = 2 if self.shape.fused_operators else 1
        for _ in range(2 // together):
            self._matmul(passes, rows, together * hidden, self.config.dim)
        self._memory(passes, rows * hidden, 3 * self.c, 5 * self.c, kernels=2, backward=5 / 3)
        self._matmul(passes, rows, self.config.dim, hidden)

    def _norm(self, passes: Passes, values: float, count: int) -> None:
        """Count norms: fused kernels read and write the compute dtype, eager ones pass through fp32."""
        c = self.c
        self._memory(passes, count * values, 2 * c, 2 * c + 4 * FP32, kernels=4 * count, backward=1.5)

    def _memory(
        self,
        passes: Passes,
        values: float,
        fused: float,
        eager: float,
        kernels: float,
        backward: float = 2.0,
    ) -> None:
        """Count an operator that moves `fused` or `eager` bytes per value, `backward` times that backward."""
        each, launched = (fused, kernels / 2) if self.shape.compiled else (eager, kernels)
        passes.forward.append(Work(Kind.memory, 0.0, values * each, launched))
        if backward:
            passes.inputs.append(Work(Kind.memory, 0.0, backward * values * each, backward * launched))

    def _matmul(
        self,
        passes: Passes,
        rows: float,
        columns: float,
        depth: float,
        experts: float = 0,
        in_fp8: bool = True,
    ) -> None:
        """Count rows x depth times depth x columns and its two gradients, of `experts` weights or of one."""
        c, weight = self.c, max(experts, 1) * columns * depth
        fp8 = self.fp8 and in_fp8
        kind = Kind.grouped if experts else Kind.matmul
        if fp8:
            kind = Kind.grouped_fp8 if experts else Kind.matmul_fp8
        saved = SavedOp.experts if experts else SavedOp.matmuls
        flops = 2 * rows * columns * depth
        read = 1 if fp8 else c
        # Of the experts' weights a pass reads those that have rows.
        left, right, out = rows * depth, weight * (min(1.0, rows / experts) if experts else 1), rows * columns
        kernels = 1.0
        if fp8:
            kernels = max(experts, 1) if not self.shape.compiled else 1.0
            if self.shape.fp8 is not None and self.shape.fp8.emulated:
                # Sums of each block of the depth are scaled and added in fp32.
                sums = out * depth / FP8_BLOCK * 5 * FP32
                for part in (passes.forward, passes.inputs, passes.weights):
                    part.append(Work(Kind.memory, 0.0, sums, 3 * depth / FP8_BLOCK))
            self._quantize(passes, left, right, out)
        passes.forward.append(Work(kind, flops, read * (left + right) + c * out, kernels, saved))
        passes.inputs.append(Work(kind, flops, read * (out + right) + c * left, kernels))
        # The weight's gradient is added to the fp32 sum, eagerly after it has been written and read again.
        sums = 2 * self.shape.state.gradient + (0 if self.shape.compiled else 2 * c)
        passes.weights.append(Work(kind, flops, read * (left + out), kernels))
        passes.weights.append(Work(Kind.memory, 0.0, sums * weight, 0 if self.shape.compiled else 2))

    def _quantize(self, passes: Passes, left: float, right: float, out: float) -> None:
        """Count reading values in the compute dtype and writing codes: operands of each matmul anew."""
        fp8 = self.shape.fp8
        assert fp8 is not None
        fused = self.shape.fused_operators
        # Gathered in FP8, or quantized once per step: the weight comes as codes.
        again = 0.0 if fp8.gather or fused else right
        # Largest magnitude, scale and rounding pass over the values apart. A fused kernel writes the codes
        # and those along the tokens with its result, which nobody else reads.
        each = 2 if fused else 3 * self.c + 2 * FP32 + 1
        launched = 0 if fused else 6
        passes.forward.append(Work(Kind.memory, 0.0, each * (left + again), launched))
        passes.inputs.append(Work(Kind.memory, 0.0, each * (out + again), launched))
        if not fused:
            passes.weights.append(Work(Kind.memory, 0.0, each * (left + out), 2 * launched))


def attention_work(
    heads: float,
    rows: float,
    length: int,
    widths: tuple[int, int],
    compute: int,
    on_gpu: bool,
    cp: int = 1,
) -> tuple[Work, Work]:
    """Return the work of causal attention in the forward and in the backward pass.

    Args:
        heads: those of this rank.
        rows: sequences.
        length: tokens of a sequence.
        widths: of a head's queries and keys, and of its values.
        compute: bytes per value.
        on_gpu: the kernel's tiles follow the diagonal; a CPU's blocks are larger.
        cp: ranks that share the queries of a sequence.
    """
    qk, v = widths
    queries, keys = rows * length / cp, rows * length
    moved = compute * heads * (queries + keys) * (qk + v)
    # On a CPU all queries of a block meet the keys that the last of them sees.
    pairs = queries * (length + (0 if on_gpu else min(QUERIES, length))) / 2
    # The scores again, and the gradients of queries, keys, values and probabilities: 5 matmuls for 2.
    forward, backward = (2 * heads * pairs * width for width in (qk + v, 3 * qk + 2 * v))
    return (
        Work(Kind.attention, forward, moved, 1, SavedOp.attention),
        Work(Kind.attention_backward, backward, 2.5 * moved, 3),
    )


def recomputed(passes: Passes, keep: tuple[SavedOp, ...] | None) -> Iterator[Work]:
    """Yield the forward work that the backward pass repeats: what `keep` does not name; None is all."""
    for work in passes.forward:
        if keep is None or work.saved is None or work.saved not in keep:
            yield work
