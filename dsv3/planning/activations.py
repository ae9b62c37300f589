"""What a forward pass keeps for the backward pass, in bytes, as closed forms of the model's sizes.

Each term is a tensor that autograd saves in dsv3/model, read off with saved_tensors_hooks (the test
does it again). `c` is the byte size of the compute dtype; norms, router and logits keep fp32.
"""

from dataclasses import dataclass

from dsv3.model.config import ModelConfig

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

    `fused_kernels` stands for attention that takes values as narrow as they are and for a norm in one
    kernel: true on GPUs. On CPU values are padded (kernels.py) and the normalised input is kept.
    """

    config: ModelConfig
    compute: int
    fused_kernels: bool = True

    def block(self, dense: bool) -> TokenBytes:
        """One layer; a token's experts count where the token is from, as with an even load."""
        return self._attention() + (self._dense_ffn() if dense else self._moe())

    def block_input(self) -> TokenBytes:
        """All that full recomputation keeps of a layer."""
        return TokenBytes(self.compute * self.config.dim)

    def mtp_join(self) -> TokenBytes:
        """An MTP depth besides its layer and logits: two norms whose outputs live on in one concatenation."""
        dim = self.config.dim
        return TokenBytes(2 * self._norm(dim))

    def logits(self) -> TokenBytes:
        """The norm before the head, fp32 logits, and their log-softmax, once a prediction."""
        return TokenBytes(self._norm(self.config.dim) + 2 * FP32 * self.config.vocab_size)

    def _norm(self, dim: int) -> int:
        """Input in fp32, output in the compute dtype; unfused also the normalised input."""
        return dim * (FP32 + self.compute + (0 if self.fused_kernels else FP32)) + FP32

    def _attention(self) -> TokenBytes:
        a, c, dim = self.config.attention, self.compute, self.config.dim
        # Latents are computed from the gathered row on every tp rank; heads are split.
        latents = self._norm(a.kv_lora_rank) + (self._norm(a.q_lora_rank) if a.q_lora_rank else 0)
        gathered = c * dim
        out = c * a.heads * a.v_head_dim
        if self.fused_kernels:
            keys_values = 2 * a.qk_head_dim + a.qk_nope_head_dim + a.v_head_dim
            heads = a.heads * (c * keys_values + FP32)
        else:
            width = max(a.qk_head_dim, a.v_head_dim)
            heads = a.heads * (2 * c * (a.qk_head_dim + width) + FP32)
        return TokenBytes(self._norm(dim) - gathered + heads + out, latents + gathered)

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
