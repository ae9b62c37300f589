"""Small layers: RMSNorm, a linear layer that computes in its input's dtype, and SwiGLU.

No layer has a bias. Weights are fp32 masters, cast to the dtype of the activations where they are used.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Matmul = Callable[[Tensor, Tensor], Tensor]
"""Matmul: (x [..., in], weight [out, in]) -> x W^T [..., out] in x's dtype."""


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dim, accumulated in fp32 for every dtype of x.

    `eps` has no default on purpose: it belongs to each model's config (HF: rms_norm_eps).
    """

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(dim))

    def forward(self, x: Tensor) -> Tensor:
        """Normalize `x` [..., dim]; same shape and dtype."""
        return F.rms_norm(x.float(), self.weight.shape, self.weight.float(), self.eps).to(x.dtype)


class Linear(nn.Linear):
    """y = x W^T without bias, computed in the dtype of x.

    The weight may be an fp32 master while x is bf16: it is cast where it is used, and its gradient is
    fp32. Replace `matmul` to compute in another format (FP8: fp8/convert_model.py).
    """

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)
        self.matmul: Matmul = linear

    def reset_parameters(self) -> None:
        """Leave the weight unchanged: initialization.py fills every parameter by name."""

    def forward(self, x: Tensor, matmul: Matmul | None = None) -> Tensor:
        """Map `x` [..., in_features] to [..., out_features], or do what `matmul` makes of `x` and weight."""
        return (matmul or self.matmul)(x, self.weight)


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """Return x W^T in the dtype of `x`; the default matmul of `Linear`."""
    return F.linear(x, weight.to(x.dtype))


class FeedForward(nn.Module):
    """SwiGLU, down(silu(gate(x)) * up(x)), of the dense layers and the shared experts (HF: mlp)."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.gate_proj = Linear(dim, hidden_dim)
        self.up_proj = Linear(dim, hidden_dim)
        self.down_proj = Linear(hidden_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Map `x` [..., dim] to the same shape."""
        out: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return out
