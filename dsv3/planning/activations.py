"""What a forward pass keeps for the backward pass, in bytes, as closed forms of the model's sizes.

Each term is a tensor that autograd saves in dsv3/model or dsv3/parallel, read off with
saved_tensors_hooks (the test does it again on one process). `c` is the byte size of the compute dtype;
norms, router and logits keep fp32.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from dsv3.config.model import ModelConfig
from dsv3.config.parallel import Kept
from dsv3.planning import expert_copies
from dsv3.planning.layout import ParallelDims

FP32 = 4

INDEX = 8


@dataclass(frozen=True)
class TokenBytes:
    """Bytes a token of the rank's part of a row: `split` is shared by its tp ranks, `whole` is on each."""

    split: int
    whole: int = 0

    def __add__(self, other: "TokenBytes") -> "TokenBytes":
        return TokenBytes(self.split + other.split, self.whole + other.whole)

    def on_rank(self, tokens: int, tp: int) -> int:
        """Bytes on one rank for `tokens` tokens, rounded up."""
        return -(-tokens * self.split // tp) + tokens * self.whole


@dataclass(frozen=True)
class Activations:
    """Saved activations of a model computing in dtypes of `compute` bytes; none grows with the square.

    `fused_kernels` stands for a norm in one kernel: true on GPUs; on CPU the normalised input is kept.
    Under context parallelism the rank with the last part of a row is meant: it expands all of its keys.
    """

    config: ModelConfig
    compute: int
    fused_kernels: bool = True
    degrees: ParallelDims = field(default_factory=ParallelDims)
    ranks_per_node: int | None = None

    def block(self, dense: bool) -> TokenBytes:
        """One layer; a token's experts count where the token is from, as with an even load."""
        return self._attention() + (self._dense_ffn() if dense else self._moe())

    def block_input(self) -> TokenBytes:
        """All that full recomputation keeps of a layer."""
        return TokenBytes(self.compute * self.config.dim)

    def kept(self, dense: bool, keep: Sequence[Kept]) -> TokenBytes:
        """What selective recomputation keeps of a layer: its input and the results of the operators named."""
        a, c = self.config.attention, self.compute
        kept = self.block_input()
        if Kept.attention in keep:
            kept += TokenBytes(a.heads * (c * a.v_head_dim + FP32))
        if Kept.matmuls in keep:
            kept += self._attention_matmuls() + self._ffn_matmuls(dense)
        if not dense and Kept.experts in keep:
            moe = self.config.moe
            kept += TokenBytes(moe.top_k * c * (2 * moe.hidden_dim + self.config.dim))
        if not dense and Kept.exchange in keep:
            kept += self._exchanged()
        return kept

    def mtp_join(self) -> TokenBytes:
        """An MTP depth besides its layer and logits: two norms whose outputs live on in one concatenation."""
        return TokenBytes(2 * self._norm(self.config.dim))

    def logits(self) -> TokenBytes:
        """The norm before the head, fp32 logits, and their log-softmax, once a prediction."""
        output = self.compute * self.config.dim
        return TokenBytes(self._norm(self.config.dim) - output + 2 * FP32 * self.config.vocab_size, output)

    def _norm(self, dim: int) -> int:
        """Input in fp32, output in the compute dtype; unfused also the normalised input."""
        return dim * (FP32 + self.compute + (0 if self.fused_kernels else FP32)) + FP32

    def _attention(self) -> TokenBytes:
        a, c, cp = self.config.attention, self.compute, self.degrees.cp
        queries = a.heads * (c * a.qk_head_dim + FP32)
        keys_values = c * a.heads * (a.qk_head_dim + a.qk_nope_head_dim + a.v_head_dim)
        # Under cp the two chunks' outputs are put together, and both forms are saved.
        out = c * a.heads * a.v_head_dim * (2 if cp > 1 else 1)
        return TokenBytes(self._norm(self.config.dim) + queries + cp * keys_values + out) + self._latents()

    def _latents(self) -> TokenBytes:
        """The latents' norms on the rank's own tokens; their outputs there, or gathered."""
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
        split = self._norm(dim) - c * dim + 4 * c * self.config.dense_hidden_dim
        return TokenBytes(split, c * dim)

    def _moe(self) -> TokenBytes:
        moe, c, dim = self.config.moe, self.compute, self.config.dim
        router = FP32 * (moe.num_experts + 2 * moe.top_k) + (0 if c == FP32 else FP32 * dim)
        # A row in and out, gate and up, silu(gate), and its product with up; the last four also shared.
        routed = moe.top_k * (c * (2 * dim + 4 * moe.hidden_dim) + 3 * INDEX)
        shared = 4 * c * moe.num_shared_experts * moe.hidden_dim
        return TokenBytes(self._norm(dim) + router + routed + shared)

    def _exchanged(self) -> TokenBytes:
        """Rows and weights of what arrives for the experts here, and of what comes back."""
        levels = expert_copies.levels(self.config.moe, self.degrees.ep, self.ranks_per_node)
        row = self.compute * self.config.dim
        return TokenBytes(round(sum(one.copies * (2 * row + 2 * FP32 * one.experts) for one in levels)))

    def _attention_matmuls(self) -> TokenBytes:
        a, c = self.config.attention, self.compute
        latents = (a.q_lora_rank or 0) + a.kv_lora_rank + a.qk_rope_head_dim
        keys_values = self.degrees.cp * a.heads * (a.qk_nope_head_dim + a.v_head_dim)
        split = c * (latents + a.heads * a.qk_head_dim + keys_values)
        return TokenBytes(split, c * self.config.dim)

    def _ffn_matmuls(self, dense: bool) -> TokenBytes:
        moe, c, dim = self.config.moe, self.compute, self.config.dim
        if dense:
            return TokenBytes(2 * c * self.config.dense_hidden_dim, c * dim)
        shared = moe.num_shared_experts * moe.hidden_dim
        return TokenBytes(FP32 * moe.num_experts + (c * (2 * shared + dim) if shared else 0))
