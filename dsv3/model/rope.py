"""Rotary position embedding (RoPE) on adjacent pairs, and YaRN, which stretches its frequencies.

DeepSeek-V3 pre-trains at 4K tokens without YaRN and extends the context to 128K with it (report section 4.3).
Sources: RoFormer (arXiv 2104.09864), YaRN (arXiv 2309.00071), and the constants of the released
DeepSeek checkpoints, whose weights expect interleaved pairs (x0, x1), (x2, x3), ...
"""

import math

import torch
from torch import Tensor

from dsv3.config.model import RopeConfig, RopeScaling
from dsv3.model.transfers import upload


def rotary_table(config: RopeConfig, rope_dim: int, positions: Tensor) -> Tensor:
    """Return the cosines and sines of every position: [..., rope_dim / 2, 2] in fp32.

    `positions` [...] are token indices. YaRN multiplies both by the ratio of its two mscales.
    """
    # The CPU's powers, so that the frequencies are the same bits on every device.
    angles = positions.float()[..., None] * upload(inverse_frequencies(config, rope_dim), positions.device)
    table = torch.stack([angles.cos(), angles.sin()], dim=-1)
    if config.scaling is RopeScaling.yarn:
        table = table * (
            _mscale(config.factor, config.mscale) / _mscale(config.factor, config.mscale_all_dim)
        )
    return table


def apply_rotary(x: Tensor, table: Tensor) -> Tensor:
    """Rotate each adjacent pair of `x` [batch, sequence, heads, rope_dim] by its position's angle.

    `table` is [sequence, rope_dim / 2, 2] or [batch, sequence, rope_dim / 2, 2]. Computes in fp32 and returns
    the shape and dtype of `x`.
    """
    cos, sin = table.unsqueeze(-3).unbind(-1)
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    rotated = torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1)
    return rotated.flatten(-2).to(x.dtype)


def inverse_frequencies(config: RopeConfig, rope_dim: int) -> Tensor:
    """Return radians per token [rope_dim / 2] fp32: theta^(-2i / rope_dim), interpolated if YaRN is on."""
    exponents = torch.arange(0, rope_dim, 2, dtype=torch.float32) / rope_dim
    frequencies = 1.0 / config.theta**exponents
    if config.scaling is RopeScaling.none:
        return frequencies
    ramp = yarn_ramp(config, rope_dim)
    return frequencies / config.factor * ramp + frequencies * (1.0 - ramp)


def yarn_ramp(config: RopeConfig, rope_dim: int) -> Tensor:
    """Return each pair's interpolation [rope_dim / 2]: 0 keeps its frequency, 1 divides it by `factor`.

    Pairs that make more than `beta_fast` turns within the original length keep their frequency. Pairs that
    make less than `beta_slow` turns are fully interpolated. Between them the ramp is linear (YaRN eq. 18; the
    bounds are rounded outwards as in the released code). beta_fast = beta_slow (Kimi K2) gives a step.
    """
    low = max(math.floor(_pair_that_turns(config.beta_fast, config, rope_dim)), 0)
    high = min(math.ceil(_pair_that_turns(config.beta_slow, config, rope_dim)), rope_dim - 1)
    width = max(high - low, 0.001)
    pairs = torch.arange(rope_dim // 2, dtype=torch.float32)
    return ((pairs - low) / width).clamp(0.0, 1.0)


def softmax_scale(config: RopeConfig, qk_head_dim: int) -> float:
    """Return the factor of attention logits: qk_head_dim^-1/2, with YaRN times its temperature squared."""
    scale: float = qk_head_dim**-0.5
    if config.scaling is RopeScaling.yarn:
        scale *= _mscale(config.factor, config.mscale_all_dim) ** 2
    return scale


def _pair_that_turns(turns: float, config: RopeConfig, rope_dim: int) -> float:
    """Return the (fractional) index of the pair that makes `turns` full turns in the original length."""
    length = config.original_sequence_length
    return rope_dim * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(config.theta))


def _mscale(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0
