"""Next-token logits of a model whose rows, vocabulary or layers are split over ranks."""

import torch
from torch import Tensor

from dsv3.training.passes import Passes


class RecomputedLogits:
    """Every call passes the whole rows through the model again: exact on any layout, and slow."""

    def __init__(self, passes: Passes, rows: int, multiple: int, device: torch.device) -> None:
        self.passes = passes
        self.ids: list[list[int]] = [[] for _ in range(rows)]
        self.multiple = multiple
        self.device = device

    def __call__(self, new: list[list[int]]) -> Tensor:
        """Logits [rows, vocab] for the token after the ids `new` of each row; see NextLogits."""
        for known, ids in zip(self.ids, new, strict=True):
            known += ids
        # Padding on the right changes nothing before it, and lets rows be split evenly.
        longest = -(-max(map(len, self.ids)) // self.multiple) * self.multiple
        tokens = torch.zeros(len(self.ids), longest, dtype=torch.int64)
        for row, ids in enumerate(self.ids):
            tokens[row, : len(ids)] = torch.tensor(ids)
        logits = self.passes.logits(tokens.to(self.device))
        last = torch.tensor([len(ids) - 1 for ids in self.ids], device=self.device)
        return logits[torch.arange(len(last), device=self.device), last]
