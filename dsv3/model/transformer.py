"""One layer: attention and feed-forward, each behind its norm and around a residual.

Multi-token prediction: one more layer a depth that looks one token further ahead.

Report section 2.2, equations 21 to 25. Embedding and head are the main model's.


The whole model: embedding, layers, norm and head, and the MTP depths behind them.
"""

from dataclasses import dataclass, fields

import torch
from torch import Tensor, nn

from dsv3.config.model import AttentionConfig, ModelConfig, MoEConfig, RopeConfig
from dsv3.model.attention import LatentAttention
from dsv3.model.attention_kernels import Segments, document_segments
from dsv3.model.kv_cache import CacheStep, LayerCache
from dsv3.model.layers import FeedForward, Linear, LocalVocabularyShard, RMSNorm
from dsv3.model.moe import MoE
from dsv3.model.rope import rotary_table, softmax_scale
from dsv3.model.router import Router, RouterStats


class Block(nn.Module):
    """A dense or an MoE transformer layer (HF: model.layers.N)."""

    def __init__(self, config: ModelConfig, dense: bool) -> None:
        super().__init__()
        attention = config.attention
        scale = softmax_scale(config.rope, attention.qk_head_dim)
        self.attention_norm = RMSNorm(config.dim, config.norm_eps)
        self.attention = LatentAttention(config.dim, attention, scale, config.latent_norm_eps)
        self.ffn_norm = RMSNorm(config.dim, config.norm_eps)
        self.ffn = FeedForward(config.dim, config.dense_hidden_dim) if dense else MoE(config.dim, config.moe)

    def forward(
        self, x: Tensor, rotary: Tensor, segments: Segments | None = None, cache: LayerCache | None = None
    ) -> tuple[Tensor, RouterStats | None]:
        """Map `x` [batch, sequence, dim] to the same shape; MoE layers also give their router's stats."""
        x = x + self.attention(self.attention_norm(x), rotary, segments, cache)
        if isinstance(self.ffn, MoE):
            out, stats = self.ffn(self.ffn_norm(x))
            return x + out, stats
        return x + self.ffn(self.ffn_norm(x)), None


class MTPModule(nn.Module):
    """Depth k: joins the hidden state at position i with the embedding of token i + k.

    `projection` takes [norm(embedding), norm(hidden)], the order of the released weights (HF:
    eh_proj, enorm, hnorm); the report's eq. 21 writes the two the other way round.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embedding_norm = RMSNorm(config.dim, config.norm_eps)
        self.hidden_norm = RMSNorm(config.dim, config.norm_eps)
        self.projection = Linear(2 * config.dim, config.dim)
        self.block = Block(config, dense=False)
        self.norm = RMSNorm(config.dim, config.norm_eps)

    def forward(
        self, hidden: Tensor, embedded: Tensor, rotary: Tensor, segments: Segments | None = None
    ) -> tuple[Tensor, RouterStats | None]:
        """This depth's hidden state from the previous one and `embedded`, both [batch, sequence, dim].

        What goes from depth to depth, and to the head, has passed the depth's last norm (HF:
        shared_head.norm), as the first depth's input has passed the main model's.
        """
        joined = torch.cat([self.embedding_norm(embedded), self.hidden_norm(hidden)], dim=-1)
        x, stats = self.block(self.projection(joined), rotary, segments)
        return self.norm(x), stats


def shift_tokens(tokens: Tensor, depth: int) -> Tensor:
    """Tokens [batch, sequence] moved `depth` places ahead.

    The last `depth` places wrap around; their targets lie beyond the row, so the loss ignores them.
    """
    return tokens.roll(-depth, dims=-1)


@dataclass
class ModelOutput:
    """What a forward pass gives."""

    logits: Tensor
    """[batch, sequence, vocab] fp32, for the next token; with a cache [batch, 1, vocab]."""
    mtp_logits: list[Tensor]
    """One [batch, sequence, vocab] a depth k, for token i + 1 + k; empty in evaluation mode."""
    balance_loss: Tensor
    """Sum over MoE layers of the sequence-wise balance terms, without alpha; a scalar."""
    z_loss: Tensor
    """Sum over MoE layers of the router z-losses; a scalar."""
    broken: Tensor
    """[MoE layers] bool: where a router's logits were not finite."""


@dataclass
class LayerInputs:
    """What every layer is told beside the hidden states."""

    rotary: Tensor
    """rope.rotary_table of the positions."""
    segments: Segments | None


class LocalSequenceShard:
    """The model sees whole rows; parallel/context.py has one for rows split over ranks."""

    def take_local(self, x: Tensor) -> Tensor:
        """This rank's positions of `x` [..., sequence]."""
        return x

    def gather(self, x: Tensor) -> Tensor:
        """The row again, from every rank's positions `x` [batch, sequence, ..]."""
        return x


class Transformer(nn.Module):
    """A DeepSeek-V3 family model; its arguments are the fields of config.ModelConfig.

    `compute_dtype` is the dtype of the activations; weights are cast to it where they are used.
    """

    def __init__(
        self,
        vocab_size: int,
        dim: int,
        num_layers: int,
        num_dense_layers: int,
        dense_hidden_dim: int,
        attention: AttentionConfig,
        moe: MoEConfig,
        rope: RopeConfig,
        mtp_depths: int,
        norm_eps: float,
        latent_norm_eps: float,
        init_std: float,
        compute_dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        own = locals()
        self.config = ModelConfig(**{f.name: own[f.name] for f in fields(ModelConfig) if f.name in own})
        self.compute_dtype = compute_dtype
        self.embedding: nn.Embedding = nn.Embedding(vocab_size, dim)
        blocks = {str(n): Block(self.config, dense=n < num_dense_layers) for n in range(num_layers)}
        self.layers = nn.ModuleDict(blocks)
        self.norm = RMSNorm(dim, norm_eps)
        self.head = Linear(dim, vocab_size)
        self.mtp = nn.ModuleList(MTPModule(self.config) for _ in range(mtp_depths))
        self.sequence_shard = LocalSequenceShard()
        self.vocabulary_shard = LocalVocabularyShard()

    def forward(
        self, tokens: Tensor, documents: Tensor | None = None, cache: CacheStep | None = None
    ) -> ModelOutput:
        """Logits for `tokens` [batch, sequence]; `documents` (same shape) keeps attention within them.

        With a `cache` (generation, where a row is one document) the tokens follow those that it holds,
        and each row's last one alone gets logits.
        """
        layer_inputs = self.layer_inputs(tokens, documents, cache)
        x, stats = self.run_layers(self.embed(self.sequence_shard.take_local(tokens)), layer_inputs, cache)
        x = self.norm(x if cache is None else cache.last_token(x))
        logits, mtp_logits, more = self.predict(x, tokens, layer_inputs)
        return ModelOutput(logits, mtp_logits, *sum_stats(stats + more, x))

    def layer_inputs(
        self, tokens: Tensor, documents: Tensor | None, cache: CacheStep | None = None
    ) -> LayerInputs:
        """What every layer needs to know of `tokens` and `documents`, both [batch, sequence]."""
        positions = self.sequence_shard.take_local(torch.arange(tokens.shape[-1], device=tokens.device))
        positions = positions if cache is None else cache.positions
        rotary = rotary_table(self.config.rope, self.config.attention.qk_rope_head_dim, positions)
        return LayerInputs(rotary, document_segments(documents))

    def run_layers(
        self, x: Tensor, layer_inputs: LayerInputs, cache: CacheStep | None = None
    ) -> tuple[Tensor, list[RouterStats]]:
        """Pass `x` [batch, sequence, dim] through the layers; also what their routers tell."""
        stats_of_layers: list[RouterStats] = []
        for name, block in self.layers.items():
            layer_cache = None if cache is None else cache.layer(int(name))
            x, stats = block(x, layer_inputs.rotary, layer_inputs.segments, layer_cache)
            stats_of_layers += self._counted(block, stats)
        return x, stats_of_layers

    def predict(
        self, x: Tensor, tokens: Tensor, layer_inputs: LayerInputs
    ) -> tuple[Tensor, list[Tensor], list[RouterStats]]:
        """Logits of the next token from the normed `x`, and in training those of every MTP depth.

        `tokens` [batch, sequence] are whole rows: depth k joins each position with the token k further.
        """
        logits, mtp_logits = self.head(x).float(), []
        stats_of_layers: list[RouterStats] = []
        # Evaluation and generation need the next token only.
        for depth, module in enumerate(self.mtp if self.training else (), start=1):
            assert isinstance(module, MTPModule)
            ahead = self.embed(self.sequence_shard.take_local(shift_tokens(tokens, depth)))
            x, stats = module(x, ahead, layer_inputs.rotary, layer_inputs.segments)
            stats_of_layers += self._counted(module.block, stats)
            mtp_logits.append(self.head(x).float())
        return logits, mtp_logits, stats_of_layers

    def embed(self, tokens: Tensor) -> Tensor:
        """Vectors [batch, sequence, dim] of `tokens` [batch, sequence], in the compute dtype."""
        return self.embedding(tokens).to(self.compute_dtype)  # type: ignore[no-any-return]

    def routers(self) -> list[Router]:
        """The routers of every MoE layer in order, the MTP depths' last."""
        return [module for module in self.modules() if isinstance(module, Router)]

    def moe_layers(self) -> list[str]:
        """The names of the layers of `routers()`."""
        return [name.removesuffix(".ffn.router") for name, m in self.named_modules() if isinstance(m, Router)]

    def _counted(self, block: nn.Module, stats: RouterStats | None) -> list[RouterStats]:
        """The layer's stats, if it has a router; in training its load is added up for the bias update."""
        if stats is None:
            return []
        if self.training:
            assert isinstance(block, Block)
            assert isinstance(block.ffn, MoE)
            block.ffn.router.load += stats.load
        return [stats]


def sum_stats(stats: list[RouterStats], like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Balance terms and z-losses summed over layers, and which layers broke; on the device of `like`."""
    if not stats:
        zero = torch.zeros((), device=like.device)
        return zero, zero, zero.new_zeros(0, dtype=torch.bool)
    return (
        torch.stack([one.balance_loss for one in stats]).sum(),
        torch.stack([one.z_loss for one in stats]).sum(),
        ~torch.stack([one.finite for one in stats]),
    )
