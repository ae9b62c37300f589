"""A tiny model, and the parts of DeepSeek-V3 written out a second time: one number, token and head at a time.

Nothing here calls dsv3.model's arithmetic; it only reads the parameters of its modules. Everything is
differentiable, so that gradients can be compared too.
"""

import cmath
import math
from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from dsv3.config.model import (
    AttentionConfig,
    ModelConfig,
    MoEConfig,
    RopeConfig,
    RopeScaling,
    ScoreFunction,
)
from dsv3.model.attention import LatentAttention
from dsv3.model.layers import FeedForward, RMSNorm
from dsv3.model.moe import Experts, MoE
from dsv3.model.router import Router
from dsv3.model.transformer import Block, MTPModule, Transformer

ATTENTION = AttentionConfig(
    heads=2, q_lora_rank=12, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=6
)
MOE = MoEConfig(
    num_experts=8,
    top_k=3,
    num_shared_experts=1,
    hidden_dim=16,
    num_groups=4,
    top_k_groups=2,
    route_scale=2.5,
)
MODEL = ModelConfig(
    vocab_size=48,
    dim=32,
    num_layers=2,
    num_dense_layers=1,
    dense_hidden_dim=40,
    attention=ATTENTION,
    moe=MOE,
    # Large and unequal, so that a swapped or forgotten eps shows.
    norm_eps=0.1,
    latent_norm_eps=0.4,
    mtp_depths=1,
)
SOFTMAX_MOE = replace(
    MOE,
    score_function=ScoreFunction.softmax,
    selection_bias=False,
    normalize_top_k=False,
    route_scale=1.5,
    num_shared_experts=2,
)
YARN = RopeConfig(
    scaling=RopeScaling.yarn,
    theta=100.0,
    factor=8.0,
    original_sequence_length=64,
    beta_fast=4.0,
    mscale=1.0,
    mscale_all_dim=0.5,
)


def tiny_model(config: ModelConfig = MODEL, seed: int = 0, dtype: torch.dtype = torch.float32) -> Transformer:
    """A model with random weights, norms and selection biases, all far from their initial values."""
    arguments: dict[str, Any] = {f.name: getattr(config, f.name) for f in fields(config) if f.name[0] != "_"}
    model = Transformer(**arguments, compute_dtype=dtype)
    randomize(model, seed)
    return model


def randomize(module: nn.Module, seed: int = 0) -> None:
    """Fill parameters with activations of size 1 in mind, selection biases with +-0.1; loads with 0."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=draw))
            if parameter.ndim > 1:
                parameter.mul_(parameter.shape[-1] ** -0.5)
            else:
                parameter.mul_(0.3).add_(1.0)
        for name, buffer in module.named_buffers():
            bias = name.endswith("selection_bias")
            buffer.copy_(
                0.1 * torch.randn(buffer.shape, generator=draw) if bias else torch.zeros_like(buffer)
            )


def normal(*shape: int, seed: int = 1) -> Tensor:
    """Standard normal numbers that need a gradient."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def tokens(*shape: int, vocab: int = MODEL.vocab_size, seed: int = 2) -> Tensor:
    """Random token ids."""
    return torch.randint(vocab, shape, generator=torch.Generator().manual_seed(seed))


def assert_close(found: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    """The largest difference is at most `tolerance` of the largest expected number."""
    assert found.shape == expected.shape
    error = (found.double() - expected.double()).abs().max().item()
    assert error <= tolerance * expected.double().abs().max().item() + 1e-12, error


def assert_same_gradients(
    found: Tensor, expected: Tensor, inputs: Sequence[Tensor], tolerance: float = 1e-5
) -> None:
    """Both outputs have the same gradient with respect to all `inputs`, none of it zero throughout."""
    weights = torch.randn(found.shape, generator=torch.Generator().manual_seed(3))
    ours = torch.autograd.grad((found * weights).sum(), inputs, retain_graph=True)
    theirs = torch.autograd.grad((expected * weights).sum(), inputs, retain_graph=True)
    for mine, right in zip(ours, theirs, strict=True):
        assert right.abs().max() > 0
        assert_close(mine, right, tolerance)


def rms_norm(module: RMSNorm, x: Tensor, eps: float) -> Tensor:
    """One vector divided by its root mean square."""
    return x / (sum(v * v for v in x.unbind()) / len(x) + eps) ** 0.5 * module.weight


def rope(x: Tensor, position: int, config: RopeConfig) -> Tensor:
    """One vector turned as complex numbers x0 + i x1, x2 + i x3, ...; YaRN as in its paper's section 3."""
    pairs = torch.view_as_complex(x.reshape(-1, 2).contiguous())
    size = 1.0
    if config.scaling is RopeScaling.yarn:
        size = temperature(config.factor, config.mscale) / temperature(config.factor, config.mscale_all_dim)
    turns = [size * cmath.exp(1j * position * frequency(config, n, len(x))) for n in range(len(pairs))]
    return torch.view_as_real(pairs * torch.tensor(turns, dtype=torch.complex64)).flatten()


def frequency(config: RopeConfig, pair: int, rope_dim: int) -> float:
    """Radians a token of one pair."""
    base: float = config.theta ** (-2 * pair / rope_dim)
    if config.scaling is RopeScaling.none:
        return base

    def bound(turns: float) -> float:
        # The pair n with original_length * theta^(-2n/d) = 2 pi turns.
        return rope_dim / 2 * math.log(config.original_sequence_length / (2 * math.pi * turns), config.theta)

    low, high = max(math.floor(bound(config.beta_fast)), 0), math.ceil(bound(config.beta_slow))
    if pair <= low:
        return base
    if pair >= high:
        return base / config.factor
    share = (pair - low) / (high - low)
    return (1 - share) * base + share * base / config.factor


def temperature(factor: float, mscale: float) -> float:
    """YaRN's 0.1 m ln(s) + 1."""
    return 0.1 * mscale * math.log(factor) + 1


def attention(
    module: LatentAttention, x: Tensor, config: ModelConfig, documents: Tensor | None = None
) -> Tensor:
    """MLA over `x` [batch, sequence, dim], one query position and one head at a time."""
    c, eps = config.attention, config.latent_norm_eps
    scale = c.qk_head_dim**-0.5
    if config.rope.scaling is RopeScaling.yarn:
        scale *= temperature(config.rope.factor, config.rope.mscale_all_dim) ** 2
    kv_b = module.kv_b_proj.weight.view(c.heads, c.qk_nope_head_dim + c.v_head_dim, c.kv_lora_rank)
    rows = []
    for b, row in enumerate(x):
        queries, keys, values, out = [], [], [], []
        for position, vector in enumerate(row):
            if c.q_lora_rank is None:
                q = module.q_proj.weight @ vector
            else:
                low = rms_norm(module.q_a_norm, module.q_a_proj.weight @ vector, eps)
                q = module.q_b_proj.weight @ low
            kv = module.kv_a_proj.weight @ vector
            latent = rms_norm(module.kv_a_norm, kv[: c.kv_lora_rank], eps)
            k_rope = rope(kv[c.kv_lora_rank :], position, config.rope)
            heads_q, heads_k, heads_v = [], [], []
            for head, q_head in enumerate(q.view(c.heads, -1)):
                nope = c.qk_nope_head_dim
                heads_q.append(torch.cat([q_head[:nope], rope(q_head[nope:], position, config.rope)]))
                expanded = kv_b[head] @ latent
                heads_k.append(torch.cat([expanded[:nope], k_rope]))
                heads_v.append(expanded[nope:])
            queries.append(heads_q)
            keys.append(heads_k)
            values.append(heads_v)
        for i in range(len(row)):
            seen = [j for j in range(i + 1) if documents is None or documents[b, j] == documents[b, i]]
            heads = []
            for head in range(c.heads):
                powers = [torch.exp(scale * queries[i][head] @ keys[j][head]) for j in seen]
                parts = [p * values[j][head] for p, j in zip(powers, seen, strict=True)]
                heads.append(torch.stack(parts).sum(0) / torch.stack(powers).sum())
            out.append(module.o_proj.weight @ torch.cat(heads))
        rows.append(torch.stack(out))
    return torch.stack(rows)


def choose(scores: Sequence[float], bias: Sequence[float] | None, config: MoEConfig) -> list[int]:
    """The experts of one token: groups by their best one or two (biased) scores, then the best experts."""
    biased = [s + b for s, b in zip(scores, bias or [0.0] * len(scores), strict=True)]
    size = config.num_experts // config.num_groups
    groups = [range(g * size, (g + 1) * size) for g in range(config.num_groups)]

    def group_score(group: range) -> float:
        return sum(sorted((biased[e] for e in group), reverse=True)[: 1 if bias is None else 2])

    open_groups = sorted(groups, key=group_score, reverse=True)[: config.top_k_groups]
    reachable = [e for group in open_groups for e in group]
    return sorted(reachable, key=lambda e: biased[e], reverse=True)[: config.top_k]


def affinities(router: Router, vector: Tensor) -> Tensor:
    """Scores [experts] of one token."""
    logits = router.weight @ vector
    if router.config.score_function is ScoreFunction.sigmoid:
        return 1 / (1 + torch.exp(-logits))
    return torch.exp(logits) / torch.exp(logits).sum()


def swiglu(gate: Tensor, up: Tensor, down: Tensor, vector: Tensor) -> Tensor:
    """One vector through one expert."""
    gated = gate @ vector
    return down @ (gated / (1 + torch.exp(-gated)) * (up @ vector))


def feed_forward(module: FeedForward, vector: Tensor) -> Tensor:
    """One vector through a dense feed-forward."""
    return swiglu(module.gate_proj.weight, module.up_proj.weight, module.down_proj.weight, vector)


def expert(module: Experts, number: int, vector: Tensor) -> Tensor:
    """One vector through one routed expert."""
    gate, up = module.gate_up_proj[number].chunk(2)
    return swiglu(gate, up, module.down_proj[number], vector)


def moe(module: MoE, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`x` [batch, sequence, dim] through an MoE layer; its load [experts]; its balance term."""
    router, config = module.router, module.router.config
    bias = None if router.selection_bias is None else router.selection_bias.tolist()
    load = torch.zeros(config.num_experts)
    rows, terms = [], []
    for row in x:
        out, scores = [], [affinities(router, vector) for vector in row]
        for vector, score in zip(row, scores, strict=True):
            chosen = choose(score.tolist(), bias, config)
            total = sum(score[e] for e in chosen) if config.normalize_top_k else 1.0
            y = torch.zeros_like(vector)
            for e in chosen:
                load[e] += 1
                y = y + config.route_scale * score[e] / total * expert(module.experts, e, vector)
            if module.shared_experts is not None:
                y = y + feed_forward(module.shared_experts, vector)
            out.append(y)
        rows.append(torch.stack(out))
        terms.append(balance_term(scores, config.top_k))
    return torch.stack(rows), load, torch.stack(terms).mean()


def balance_term(scores: list[Tensor], top_k: int) -> Tensor:
    """Equations 17 to 20 without alpha for one sequence of scores [experts]."""
    experts, length = len(scores[0]), len(scores)
    total = torch.zeros(())
    for i in range(experts):
        best = [sorted(range(experts), key=lambda e, s=s: -s[e].item())[:top_k] for s in scores]  # type: ignore[misc]
        f = experts / (top_k * length) * sum(i in chosen for chosen in best)
        total = total + f * sum(s[i] / s.sum() for s in scores) / length
    return total


def block(
    module: Block, x: Tensor, config: ModelConfig, documents: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor]:
    """One layer; its load (None where it is dense) and its balance term."""
    x = x + attention(module.attention, _norm(module.attention_norm, x, config), config, documents)
    normed = _norm(module.ffn_norm, x, config)
    if isinstance(module.ffn, MoE):
        out, load, term = moe(module.ffn, normed)
        return x + out, load, term
    ffn = module.ffn
    out = torch.stack([torch.stack([feed_forward(ffn, vector) for vector in row]) for row in normed])
    return x + out, None, torch.zeros(())


def transformer(
    model: Transformer, ids: Tensor, documents: Tensor | None = None
) -> tuple[Tensor, list[Tensor], Tensor, list[Tensor]]:
    """Logits, MTP logits a depth (zero where token i + k is beyond the row), balance sum, loads."""
    config = model.config
    loads, balance = [], torch.zeros(())
    x = model.embedding.weight[ids]
    for layer in model.layers.values():
        assert isinstance(layer, Block)
        x, load, term = block(layer, x, config, documents)
        balance = balance + term
        loads += [] if load is None else [load]
    hidden = _norm(model.norm, x, config)
    logits = hidden @ model.head.weight.T
    predicted = []
    for depth, module in enumerate(model.mtp, start=1):
        assert isinstance(module, MTPModule)
        # Beyond the row any token does; wrapping around is what the model does, which keeps loads equal.
        ahead = torch.stack([torch.cat([row[depth:], row[:depth]]) for row in ids])
        embedded = _norm(module.embedding_norm, model.embedding.weight[ahead], config)
        joined = torch.cat([embedded, _norm(module.hidden_norm, hidden, config)], dim=-1)
        x, load, term = block(module.block, joined @ module.projection.weight.T, config, documents)
        balance = balance + term
        loads += [] if load is None else [load]
        # Released weights: what the next depth receives has passed this depth's own last norm.
        hidden = _norm(module.norm, x, config)
        predicted.append(hidden @ model.head.weight.T)
    return logits, predicted, balance, loads


def _norm(module: RMSNorm, x: Tensor, config: ModelConfig) -> Tensor:
    return torch.stack([torch.stack([rms_norm(module, v, config.norm_eps) for v in row]) for row in x])
