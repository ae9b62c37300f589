"""The small parts: RMSNorm, a linear map that follows its input's dtype, and the SwiGLU feed-forward.

Cross-entropy of the next token, over the vocabulary that a rank has logits for.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Product = Callable[[Tensor, Tensor], Tensor]
"""From x [..., in_features] and a weight [out_features, in_features] to x W^T, in the dtype of x."""


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dim, accumulated in fp32 whatever the dtype of x.

    `eps` has no default on purpose: it belongs to each model's config (HF: rms_norm_eps).
    """

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(dim))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise `x` [..., dim]; same shape and dtype."""
        return F.rms_norm(x.float(), self.weight.shape, self.weight.float(), self.eps).to(x.dtype)


class Linear(nn.Linear):
    """y = x W^T without bias, computed in the dtype of x.

    The weight may be an fp32 master while x is bf16: it is cast at its use, and its gradient comes
    back in fp32. Another `product` takes other number formats.
    """

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)
        self.product: Product = linear

    def reset_parameters(self) -> None:
        """Leave the weight as it is: initialization.py fills every parameter by name."""

    def forward(self, x: Tensor) -> Tensor:
        """Map `x` [..., in_features] to [..., out_features]."""
        return self.product(x, self.weight)


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """The product of `Linear` in the dtype of `x`."""
    return F.linear(x, weight.to(x.dtype))


class FeedForward(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)); the dense layers and the shared experts (HF: mlp)."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.gate_proj = Linear(dim, hidden_dim)
        self.up_proj = Linear(dim, hidden_dim)
        self.down_proj = Linear(hidden_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Map `x` [..., dim] to the same shape."""
        out: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


IGNORE = -100
"""The target that does not count: ignore_index of torch's cross-entropy."""


def cross_entropy_sum(logits: Tensor, targets: Tensor) -> Tensor:
    """Sum over valid `targets` [batch, sequence] of -log softmax(logits)[target], in fp32 nats."""
    flat = logits.float().flatten(0, -2)
    return F.cross_entropy(flat, targets.flatten(), ignore_index=IGNORE, reduction="sum")


class LocalVocabularyShard:
    """Logits are there for every id; parallel/vocabulary.py has one for logits split over ranks."""

    def cross_entropy_sum(self, logits: Tensor, targets: Tensor) -> Tensor:
        """The function of that name."""
        return cross_entropy_sum(logits, targets)

    def gather(self, logits: Tensor) -> Tensor:
        """The logits [..., vocab] of all ids."""
        return logits
