"""DeepSeek-V3 (arXiv 2412.19437): embedding, layers, norm, head, and the depths of multi-token prediction.

What is special in DeepSeek-V3, and where it stands:
- Multi-head latent attention: the KV cache holds 576 values per token and layer instead of 32,832, and
  decoding attends to the cached latents without expanding them. attention.py, kv_cache.py.
- RoPE on a separate 64-wide part of queries and keys, and YaRN for the context of 128K. rope.py.
- Fine-grained mixture of experts: 8 of 256 small experts per token plus 1 shared expert; the first 3 of 61
  layers are dense. moe.py, and `Block` here.
- Auxiliary-loss-free load balancing: an expert bias decides which experts are chosen, not their weights. The
  router scores by sigmoid and limits a token to the best 4 of 8 groups of experts. router.py;
  training/expert_bias.py moves the bias after each optimizer step.
- A small sequence-wise balance loss on top. router.py.
- Multi-token prediction: one more layer per depth predicts one token further ahead. `MTPModule` here;
  training/loss.py says what each depth is scored against and how it counts.
- FP8 matmuls with one scale per 1 x 128 tile or 128 x 128 block: the room dsv3/fp8 replaces `Linear.matmul`
  and `Experts.matmul`.

The rest is common: RMSNorm before each sub-layer, SwiGLU (layers.py), no biases, an untied head (head.py:
logits, or the loss without them), normal initial weights (initialization.py). generation.py samples text.

The model knows nothing of ranks. Parallel wrappers (dsv3/parallel) replace these attributes, each of which
has a local form here: `Transformer.sequence_shard`, `take_hidden` and `select_last_token`,
`Head.vocabulary_shard`, `LatentAttention.gather_latents`, `gather_row` and `attend`, `MoE.dispatcher`,
`Router.reduction`.

Shapes: B batch, T sequence, D dim, E experts, V vocabulary.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor, nn

from dsv3.config.model import AttentionConfig, ModelConfig, MoEConfig, RopeConfig
from dsv3.model.attention import LatentAttention
from dsv3.model.attention_kernels import Segments, document_segments
from dsv3.model.head import Head, HeadLoss, HeadTargets
from dsv3.model.kv_cache import CacheStep, LayerCache, select_last_token
from dsv3.model.layers import FeedForward, Linear, RMSNorm
from dsv3.model.moe import MoE
from dsv3.model.padding import PaddingMask, padding_mask
from dsv3.model.rope import rotary_table, softmax_scale
from dsv3.model.router import Router, RouterStats


class Block(nn.Module):
    """One pre-norm transformer layer, dense or MoE (HF: model.layers.N)."""

    def __init__(self, config: ModelConfig, dense: bool) -> None:
        super().__init__()
        attention = config.attention
        scale = softmax_scale(config.rope, attention.qk_head_dim)
        self.attention_norm = RMSNorm(config.dim, config.norm_eps)
        self.attention = LatentAttention(config.dim, attention, scale, config.latent_norm_eps)
        self.ffn_norm = RMSNorm(config.dim, config.norm_eps)
        self.ffn = FeedForward(config.dim, config.dense_hidden_dim) if dense else MoE(config.dim, config.moe)

    def forward(
        self,
        x: Tensor,
        rotary: Tensor,
        segments: Segments | None = None,
        cache: LayerCache | None = None,
        padding: PaddingMask | None = None,
    ) -> tuple[Tensor, RouterStats | None]:
        """Map `x` [B, T, D] to the same shape; also return the router's statistics (None if dense)."""
        x = x + self.attention(self.attention_norm(x), rotary, segments, cache)
        if isinstance(self.ffn, MoE):
            out, stats = self.ffn(self.ffn_norm(x), padding)
            return x + out, stats
        return x + self.ffn(self.ffn_norm(x)), None


class MTPModule(nn.Module):
    """Depth k of multi-token prediction: join hidden state i with the embedding of token i + k.

    Report section 2.2, equations 21 to 25. Embedding and head are shared with the main model.
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
        self,
        hidden: Tensor,
        embedded: Tensor,
        rotary: Tensor,
        segments: Segments | None = None,
        padding: PaddingMask | None = None,
    ) -> tuple[Tensor, RouterStats | None]:
        """Return this depth's hidden state [B, T, D] and router statistics.

        hidden: [B, T, D], the previous depth's hidden state, or the main model's for the first depth; both
            have passed their last norm (HF: shared_head.norm).
        embedded: [B, T, D], embeddings of the tokens `k` places ahead.
        """
        joined = torch.cat([self.embedding_norm(embedded), self.hidden_norm(hidden)], dim=-1)
        x, stats = self.block(self.projection(joined), rotary, segments, None, padding)
        return self.norm(x), stats


def shift_tokens(tokens: Tensor, depth: int, lengths: Tensor | None = None) -> Tensor:
    """Return `tokens` [B, T] shifted so that position i holds token i + depth.

    The last `depth` positions wrap around; their targets lie beyond the row, so the loss ignores them. Rows
    with padding have `lengths` [B] tokens, and wrap around behind the last of these: their experts are chosen
    as if the rows had been cut.
    """
    if lengths is None:
        return tokens.roll(-depth, dims=-1)
    ahead = torch.arange(tokens.shape[-1], device=tokens.device) + depth
    return tokens.gather(-1, ahead % lengths.clamp(min=1).unsqueeze(-1))


@dataclass
class ModelOutput:
    """Result of a forward pass."""

    logits: Tensor | None
    """[B, T, V] fp32, for the next token; with a KV cache [B, 1, V]. None where there are targets."""
    mtp_logits: list[Tensor]
    """One [B, T, V] fp32 per depth k, for token i + 1 + k; empty in evaluation mode, and with targets."""
    head_loss: HeadLoss | None
    """Cross-entropies of the next token and of each depth, where there are targets."""
    balance_loss: Tensor
    """Sum over MoE layers of the sequence-wise balance losses, without alpha; a scalar."""
    z_loss: Tensor
    """Sum over MoE layers of the router z-losses; a scalar."""
    nonfinite_routers: Tensor
    """[MoE layers] bool, true for routers whose logits were not all finite."""


@dataclass
class LayerInputs:
    """Inputs that all layers share, besides the hidden states."""

    rotary: Tensor
    """Cosines and sines of the positions, from rope.rotary_table: [.., T, rope_dim / 2, 2] fp32."""
    segments: Segments | None
    """The documents that attention stays within; None if each row is one."""
    padding: PaddingMask | None = None
    """The positions that are not routed; None if all hold tokens."""


class LocalSequenceShard:
    """The whole sequence on one rank; parallel/context_parallel.py has the form for sharded sequences."""

    def take_local(self, x: Tensor) -> Tensor:
        """Return this rank's positions of `x` [.., T]."""
        return x

    def gather(self, x: Tensor) -> Tensor:
        """Gather the whole sequence from each rank's positions `x` [B, T, ..]."""
        return x


SelectLastToken = Callable[[Tensor, CacheStep], Tensor]
"""(this rank's hidden states [B, T, D], step) -> those of each row's last token [B, 1, D], on every rank that
shares the row. With sequences sharded over ranks only one of them has it (parallel/context_parallel.py)."""


class Transformer(nn.Module):
    """A model of the DeepSeek-V3 family; its arguments are the fields of ModelConfig (config/model.py).

    `compute_dtype` is the dtype of the activations; weights are fp32 and cast to it where they are used.
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
        given = locals()
        self.config = ModelConfig(**{f.name: given[f.name] for f in fields(ModelConfig) if f.name in given})
        self.compute_dtype = compute_dtype
        self.embedding: nn.Embedding = nn.Embedding(vocab_size, dim)
        blocks = {str(n): Block(self.config, dense=n < num_dense_layers) for n in range(num_layers)}
        self.layers = nn.ModuleDict(blocks)
        self.norm = RMSNorm(dim, norm_eps)
        self.head = Head(dim, vocab_size)
        self.mtp = nn.ModuleList(MTPModule(self.config) for _ in range(mtp_depths))
        self.sequence_shard = LocalSequenceShard()
        self.take_hidden: Callable[[Tensor], Tensor] = self.sequence_shard.take_local
        """Takes of `x` [.., T] the positions whose hidden states this rank has: of those that it embeds, a
        part under tensor parallelism (parallel/context_parallel.py)."""
        self.select_last_token: SelectLastToken = select_last_token

    def forward(
        self,
        tokens: Tensor,
        documents: Tensor | Segments | None = None,
        cache: CacheStep | None = None,
        targets: HeadTargets | None = None,
        lengths: Sequence[int] | None = None,
    ) -> ModelOutput:
        """Compute logits for `tokens` [B, T]; `documents` [B, T] keeps attention within equal numbers.

        Documents that come as Segments have been read already: the host need not wait for the device. Rows
        of fewer tokens than T come with the `lengths` [B] of all rows; padding fills them up (padding.py).
        With `targets` compute only their loss, in which no logits outlive a chunk of tokens (head.py). With a
        `cache` (generation, where each row is one document) the tokens follow those in the cache, and only
        each row's last token gets logits.
        """
        layer_inputs = self.layer_inputs(tokens, documents, cache, lengths)
        x = self.embed(self.shard_of_pass(cache).take_local(tokens))
        x, stats = self.run_layers(x, layer_inputs, cache)
        if cache is not None:
            return ModelOutput(self.predict_next(x, cache), [], None, *sum_stats(stats, x))
        return self.predict(x, stats, tokens, layer_inputs, targets)

    def layer_inputs(
        self,
        tokens: Tensor,
        documents: Tensor | Segments | None,
        cache: CacheStep | None = None,
        lengths: Sequence[int] | None = None,
    ) -> LayerInputs:
        """Compute what all layers need of `tokens` and `documents`, both [B, T]; see `forward`."""
        own = torch.arange(tokens.shape[-1], device=tokens.device) if cache is None else cache.positions
        positions = self.shard_of_pass(cache).take_local(own)
        rotary = rotary_table(self.config.rope, self.config.attention.qk_rope_head_dim, positions)
        segments = documents if isinstance(documents, Segments) else document_segments(documents)
        if lengths is None:
            return LayerInputs(rotary, segments)
        in_row = self.take_hidden(torch.arange(tokens.shape[-1], device="cpu"))
        return LayerInputs(rotary, segments, padding_mask(lengths, in_row, tokens.device))

    def shard_of_pass(self, cache: CacheStep | None) -> LocalSequenceShard:
        """Return the part of each row that this rank computes: all of it where it decodes, token by token."""
        return LocalSequenceShard() if cache is not None and cache.decodes else self.sequence_shard

    def run_layers(
        self, x: Tensor, layer_inputs: LayerInputs, cache: CacheStep | None = None
    ) -> tuple[Tensor, list[RouterStats]]:
        """Pass `x` [B, T, D] through the layers; also return the statistics of their routers."""
        stats_of_layers: list[RouterStats] = []
        for name, block in self.layers.items():
            layer_cache = None if cache is None else cache.layer(name)
            x, stats = block(x, layer_inputs.rotary, layer_inputs.segments, layer_cache, layer_inputs.padding)
            stats_of_layers += self.record_load(block, stats)
        return x, stats_of_layers

    def predict(
        self,
        x: Tensor,
        stats: list[RouterStats],
        tokens: Tensor,
        layer_inputs: LayerInputs,
        targets: HeadTargets | None = None,
    ) -> ModelOutput:
        """Predict the next token, and in training one token more per MTP depth; see `forward`.

        x: [B, T, D], hidden states after the last layer.
        stats: statistics of the layers' routers.
        tokens: [B, T], the whole rows, since depth k joins each position with the token k places ahead.
        """
        hidden, padding = [self.norm(x)], layer_inputs.padding
        lengths = None if padding is None else padding.lengths
        # Evaluation and generation need only the next token.
        for depth, module in enumerate(self.mtp if self.training else (), start=1):
            assert isinstance(module, MTPModule)
            ahead = self.embed(self.sequence_shard.take_local(shift_tokens(tokens, depth, lengths)))
            x, of_router = module(hidden[-1], ahead, layer_inputs.rotary, layer_inputs.segments, padding)
            stats = stats + self.record_load(module.block, of_router)
            hidden.append(x)
        hidden = [self.head.vocabulary_shard.gather_tokens(x) for x in hidden]
        if targets is None:
            logits, *mtp_logits = self.head(hidden)
            return ModelOutput(logits, mtp_logits, None, *sum_stats(stats, x))
        ids = [self.sequence_shard.take_local(each) for each in targets.ids]
        return ModelOutput(None, [], self.head(hidden, targets._replace(ids=ids)), *sum_stats(stats, x))

    def predict_next(self, x: Tensor, cache: CacheStep) -> Tensor:
        """Return the logits [B, 1, V] after each row's last token, given hidden states after the layers."""
        logits: Tensor = self.head([self.norm(self.select_last_token(x, cache))])[0]
        return logits

    def embed(self, tokens: Tensor) -> Tensor:
        """Look up the embeddings [B, T, D] of `tokens` [B, T], in the compute dtype."""
        return self.embedding(tokens).to(self.compute_dtype)  # type: ignore[no-any-return]

    def routers(self) -> list[Router]:
        """Return the routers of all MoE layers in order, those of the MTP depths last."""
        return [module for module in self.modules() if isinstance(module, Router)]

    def moe_layers(self) -> list[str]:
        """Return the names of the layers of `routers()`, in the same order."""
        return [name.removesuffix(".ffn.router") for name, m in self.named_modules() if isinstance(m, Router)]

    def record_load(self, block: nn.Module, stats: RouterStats | None) -> list[RouterStats]:
        """Add the layer's tokens per expert to its router's `load`, which the expert bias update reads.

        Only training counts. Returns the statistics as a list, empty for a layer without a router.
        """
        if stats is None:
            return []
        if self.training:
            assert isinstance(block, Block)
            assert isinstance(block.ffn, MoE)
            block.ffn.router.load += stats.load
        return [stats]


def sum_stats(stats: list[RouterStats], like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return (balance_loss, z_loss, nonfinite_routers) of ModelOutput from each layer's statistics.

    The results are on the device of `like`.
    """
    if not stats:
        zero = torch.zeros((), device=like.device)
        return zero, zero, zero.new_zeros(0, dtype=torch.bool)
    return (
        torch.stack([one.balance_loss for one in stats]).sum(),
        torch.stack([one.z_loss for one in stats]).sum(),
        ~torch.stack([one.finite for one in stats]),
    )
