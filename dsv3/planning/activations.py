"""Activation memory: bytes saved for the backward pass, as closed forms of the model's sizes.

Each term is a tensor that autograd saves in dsv3/model or dsv3/parallel, as saved_tensors_hooks shows (the
test reads them again on one process). `c` is the bytes per value of the compute dtype; norms and router are
fp32. What lives besides, while a layer or the head computes, is in working_memory.py.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from dsv3.config.model import ModelConfig
from dsv3.config.parallel import SavedOp
from dsv3.planning.dispatch_volume import dispatch_levels
from dsv3.planning.layout import ParallelDims

FP32 = 4

INDEX = 8
"""Bytes of an int64 index."""


@dataclass(frozen=True)
class TokenBytes:
    """Bytes per token of a rank's part of a sequence, `sharded` over its tp ranks or `replicated` on each."""

    sharded: int
    replicated: int = 0

    def __add__(self, other: "TokenBytes") -> "TokenBytes":
        return TokenBytes(self.sharded + other.sharded, self.replicated + other.replicated)

    def on_rank(self, tokens: int, tp: int) -> int:
        """Return the bytes on one rank for `tokens` tokens, rounded up."""
        return -(-tokens * self.sharded // tp) + tokens * self.replicated


@dataclass(frozen=True)
class Activations:
    """Saved activations of a model, linear in the sequence length.

    Under context parallelism they are those of the rank with the last part of a sequence, which expands all
    of its keys.
    """

    config: ModelConfig
    compute: int
    """Bytes per value of the compute dtype."""
    fused_kernels: bool = True
    """A norm is one kernel, as on GPUs; on CPU the normalized input is saved too."""
    degrees: ParallelDims = field(default_factory=ParallelDims)
    ranks_per_node: int | None = None

    def block(self, dense: bool) -> TokenBytes:
        """Return a layer's bytes without activation checkpointing.

        A token's experts count on the rank that it comes from, as under an even load.
        """
        return self._attention() + self.feed_forward(dense)

    def feed_forward(self, dense: bool) -> TokenBytes:
        """Return the bytes of a layer's feed-forward and of the norm before it."""
        return self._dense_ffn() if dense else self._moe()

    def block_input(self) -> TokenBytes:
        """Return a layer's bytes under full activation checkpointing: its input."""
        return TokenBytes(self.compute * self.config.dim)

    def selective(self, dense: bool, keep: Sequence[SavedOp]) -> TokenBytes:
        """Return a layer's bytes under selective activation checkpointing: its input, results of `keep`."""
        a, c, moe = self.config.attention, self.compute, self.config.moe
        kept = self.block_input()
        if SavedOp.attention in keep:
            kept += TokenBytes(a.heads * (c * a.v_head_dim + FP32))
        if SavedOp.matmuls in keep:
            kept += self._attention_matmuls() + self._ffn_matmuls(dense)
        if not dense and SavedOp.experts in keep:
            kept += TokenBytes(moe.top_k * c * (2 * moe.hidden_dim + self.config.dim))
        if not dense and SavedOp.exchange in keep:
            # Rows with their weights that arrive for the experts here, and rows that come back.
            levels = dispatch_levels(moe, self.degrees.ep, self.ranks_per_node)
            row = c * self.config.dim
            kept += TokenBytes(round(sum(one.rows * (2 * row + 2 * FP32 * one.experts) for one in levels)))
        return kept

    def weight_gradients_due(self, dense: bool) -> TokenBytes:
        """Return what a layer holds between the halves of a split backward pass, besides its activations.

        These are the gradients of what its matmuls and norms give: those of its weights follow from them.
        """
        a, c = self.config.attention, self.compute
        norms = c * (2 * self.config.dim + (a.q_lora_rank or 0) + a.kv_lora_rank)
        due = TokenBytes(norms) + self._attention_matmuls() + self._ffn_matmuls(dense)
        if not dense:
            moe = self.config.moe
            due += TokenBytes(moe.top_k * c * (2 * moe.hidden_dim + self.config.dim))
        return due

    def mtp_join(self) -> TokenBytes:
        """Return an MTP depth's bytes besides its layer and prediction: two norms before its projection."""
        return TokenBytes(2 * self._norm(self.config.dim))

    def prediction(self) -> TokenBytes:
        """Return a prediction's bytes: the norm before the head, and the gradient of what it predicts from.

        The head computes that gradient in the forward pass (model/head.py), of the tokens of all tp ranks.
        """
        output = self.compute * self.config.dim
        return TokenBytes(self._norm(self.config.dim) - output, output)

    def _norm(self, dim: int) -> int:
        """Count input in fp32, output in the compute dtype, rms; unfused also the normalized input."""
        return dim * (FP32 + self.compute + (0 if self.fused_kernels else FP32)) + FP32

    def _attention(self) -> TokenBytes:
        a, c, cp = self.config.attention, self.compute, self.degrees.cp
        queries = a.heads * (c * a.qk_head_dim + FP32)
        keys_values = c * a.heads * (a.qk_head_dim + a.qk_nope_head_dim + a.v_head_dim)
        # Under cp the two chunks' outputs are concatenated, and both forms are saved.
        out = c * a.heads * a.v_head_dim * (2 if cp > 1 else 1)
        return TokenBytes(self._norm(self.config.dim) + queries + cp * keys_values + out) + self._latents()

    def _latents(self) -> TokenBytes:
        """Count the latents' norms on the rank's own tokens; their outputs there, or gathered."""
        a, c = self.config.attention, self.compute
        q, kv = a.q_lora_rank or 0, a.kv_lora_rank
        inputs = sum(self._norm(width) - c * width for width in (q, kv) if width)
        own = gathered = 0
        if self.degrees.tp > 1:
            gathered = c * ((q or self.config.dim) + kv + a.qk_rope_head_dim)
        else:
            own = c * q + (c * kv if self.degrees.cp == 1 else 0)
        if self.degrees.cp > 1:
            gathered += self.degrees.cp * c * (kv + a.qk_rope_head_dim)
        return TokenBytes(inputs + own, gathered)

    def _dense_ffn(self) -> TokenBytes:
        c, dim = self.compute, self.config.dim
        sharded = self._norm(dim) - c * dim + 4 * c * self.config.dense_hidden_dim
        return TokenBytes(sharded, c * dim)

    def _moe(self) -> TokenBytes:
        moe, c, dim = self.config.moe, self.compute, self.config.dim
        router = FP32 * (moe.num_experts + 2 * moe.top_k) + (0 if c == FP32 else FP32 * dim)
        # A row in and out, gate, up, silu(gate), and its product with up; shared experts save the last four.
        routed = moe.top_k * (c * (2 * dim + 4 * moe.hidden_dim) + 3 * INDEX)
        shared = 4 * c * moe.num_shared_experts * moe.hidden_dim
        return TokenBytes(self._norm(dim) + router + routed + shared)

    def _attention_matmuls(self) -> TokenBytes:
        a, c = self.config.attention, self.compute
        latents = (a.q_lora_rank or 0) + a.kv_lora_rank + a.qk_rope_head_dim
        keys_values = self.degrees.cp * a.heads * (a.qk_nope_head_dim + a.v_head_dim)
        sharded = c * (latents + a.heads * a.qk_head_dim + keys_values)
        return TokenBytes(sharded, c * self.config.dim)

    def _ffn_matmuls(self, dense: bool) -> TokenBytes:
        moe, c, dim = self.config.moe, self.compute, self.config.dim
        if dense:
            return TokenBytes(2 * c * self.config.dense_hidden_dim, c * dim)
        shared = moe.num_shared_experts * moe.hidden_dim
        return TokenBytes(FP32 * moe.num_experts + (c * (2 * shared + dim) if shared else 0))
