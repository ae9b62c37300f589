"""Working memory: what a step holds for a moment, besides the activations that it saves.

Two kinds of moments may be a step's peak. At the end of the forward pass the head computes the loss of a
chunk of tokens and the gradient of its weight, while everything saved is there. In the backward pass a layer
holds gradients of activations and of weights, while what it and the layers before it have saved is there. The
phases below are the moments of a layer's backward pass at which the most can live, in the order in which
autograd comes to them. benchmarks/live_memory.py holds them to what lives in a step on the meta device.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from dsv3.config.model import ModelConfig
from dsv3.planning.activations import FP32, Activations, TokenBytes
from dsv3.planning.dispatch_volume import dispatch_levels

HEAD_CHUNK_BYTES = 2**28
"""Most bytes of a chunk's fp32 logits (model/head.py, which imports torch; a test holds them equal)."""


@dataclass(frozen=True)
class Phase:
    """A moment of a layer's backward pass, against the moment before it."""

    activations: TokenBytes
    """Gradients that live, less what has been freed of the layer's saved activations."""
    gradients: int = 0
    """Bytes of gradients of weights, before they are added to those of earlier microbatches."""
    used_casts: int = 0
    """Elements of weights whose cast for the compute dtype has been freed."""


def head_chunk(tokens: int, vocabulary: int, compute: int) -> int:
    """Return the bytes of a chunk's logits over `vocabulary` ids, and of their cast for the matmuls."""
    rows = min(tokens, max(1, HEAD_CHUNK_BYTES // (FP32 * vocabulary)))
    return rows * vocabulary * (FP32 + (compute if compute < FP32 else 0))


def head_weight_gradient(elements: int, compute: int) -> int:
    """Return the bytes of the gradient of `elements` of the head: the fp32 sum, and a chunk's addend."""
    return elements * (FP32 + (compute if compute < FP32 else 0))


def backward_phases(saved: Activations, dense: bool, casts: bool, recomputed: bool) -> Iterator[Phase]:
    """Yield the phases of a layer, which may be `recomputed` right before.

    With `casts` gradients of weights arrive in the compute dtype and are cast to fp32.
    """
    config, c = saved.config, saved.compute
    arriving, cast = (c, c + FP32) if casts else (FP32, 0)
    hidden = TokenBytes(c * config.dim)
    if not dense:
        # The end of its forward pass: the experts' results before and after their permutation, the residual,
        # the shared experts' result, and if it is recomputed the gradient that has arrived already.
        others = 1 + bool(config.moe.num_shared_experts) + recomputed
        rows = config.moe.top_k + _sum_of_copies(saved)
        yield Phase(TokenBytes(round((others + rows) * c * config.dim)))
    yield from (_dense if dense else _moe)(config, c, arriving, cast)
    # Attention, after the feed-forward: gradients of the output and of queries, keys and values.
    a = config.attention
    heads = c * a.heads * (2 * a.qk_head_dim + 2 * a.v_head_dim)
    freed = saved.feed_forward(dense)
    done = TokenBytes(-freed.sharded, -freed.replicated)
    elements = 3 * config.dim * (config.dense_hidden_dim if dense else 0)
    if not dense:
        elements = 3 * config.moe.num_experts * config.dim * config.moe.hidden_dim
    yield Phase(done + hidden + TokenBytes(heads), used_casts=elements)


def _sum_of_copies(saved: Activations) -> float:
    """Count the rows per token that live besides while a rank adds up its experts' weighted results.

    A row that has arrived has room for as many results as it could have here (parallel/token_dispatch.py).
    """
    moe, ep = saved.config.moe, saved.degrees.ep
    if ep == 1:
        return 0
    arrived = dispatch_levels(moe, ep, saved.ranks_per_node)[-1].rows
    return moe.top_k + arrived * (1 + min(moe.top_k, moe.num_experts // ep))


def _dense(config: ModelConfig, c: int, arriving: int, cast: int) -> Iterator[Phase]:
    hidden, width = c * config.dim, c * config.dense_hidden_dim
    elements = config.dim * config.dense_hidden_dim
    # down_proj: the gradients of its input and of its weight, as it arrives and then as it is cast.
    yield Phase(TokenBytes(hidden + width), arriving * elements)
    yield Phase(TokenBytes(hidden), cast * elements, used_casts=elements)
    # SwiGLU: the gradients of the product and of its two factors; the product itself is gone.
    yield Phase(TokenBytes(hidden + 2 * width), used_casts=elements)


def _moe(config: ModelConfig, c: int, arriving: int, cast: int) -> Iterator[Phase]:
    moe = config.moe
    hidden, row, width = c * config.dim, moe.top_k * c * config.dim, moe.top_k * c * moe.hidden_dim
    down = moe.num_experts * config.dim * moe.hidden_dim
    gate_up = 2 * down
    # down_proj: its results are gone; the gradients of its rows, before and after it, and of its weight.
    yield Phase(TokenBytes(hidden + width), arriving * down)
    yield Phase(TokenBytes(hidden - row), cast * down, used_casts=down)
    # SwiGLU: as in a dense layer.
    yield Phase(TokenBytes(hidden - row + 2 * width), used_casts=down)
    # gate_up_proj: of the saved rows only its input is left, and at the cast not even that.
    yield Phase(TokenBytes(hidden - 2 * width), arriving * gate_up, used_casts=down)
    yield Phase(TokenBytes(hidden - row - 4 * width), cast * gate_up, used_casts=down + gate_up)
