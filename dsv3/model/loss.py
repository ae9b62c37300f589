"""Cross-entropy of the next token, over the vocabulary that a rank has logits for."""

import torch.nn.functional as F
from torch import Tensor

IGNORE = -100
"""The target that does not count: ignore_index of torch's cross-entropy."""


def cross_entropy_sum(logits: Tensor, targets: Tensor) -> Tensor:
    """Sum over valid `targets` [batch, sequence] of -log softmax(logits)[target], in fp32 nats."""
    flat = logits.float().flatten(0, -2)
    return F.cross_entropy(flat, targets.flatten(), ignore_index=IGNORE, reduction="sum")


class WholeVocabulary:
    """Logits are there for every id; parallel/vocabulary.py has one for logits split over ranks."""

    def cross_entropy_sum(self, logits: Tensor, targets: Tensor) -> Tensor:
        """The function of that name."""
        return cross_entropy_sum(logits, targets)

    def whole(self, logits: Tensor) -> Tensor:
        """The logits [..., vocab] of all ids."""
        return logits
