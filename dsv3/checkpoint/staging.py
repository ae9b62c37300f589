"""Copies of a run's tensors on the host, from which a checkpoint is written while training goes on."""

from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import MetadataIndex

from dsv3.checkpoint.state import local


class Staging:
    """Host memory for a rank's part of every tensor, taken once and used for every save.

    For tensors of a GPU it is pinned, so that the copies run at the full rate of the bus, all at once.
    """

    def __init__(self) -> None:
        self.copies: dict[str, Tensor] = {}

    @torch.no_grad()
    def copy(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """This rank's part of each tensor as it is now, by name; valid until the next call."""
        on_gpu = False
        for name, tensor in tensors.items():
            part = local(tensor)
            self._room(name, part).copy_(part, non_blocking=True)
            on_gpu |= part.is_cuda
        for name in self.copies.keys() - tensors.keys():
            del self.copies[name]
        if on_gpu:  # the next step changes what is copied yet
            torch.cuda.current_stream().synchronize()
        return dict(self.copies)

    def _room(self, name: str, part: Tensor) -> Tensor:
        copy = self.copies.get(name)
        if copy is None or copy.shape != part.shape or copy.dtype != part.dtype:
            copy = torch.empty_like(part, device="cpu", pin_memory=part.is_cuda)
            self.copies[name] = copy
        return copy


class StagedPlanner(DefaultSavePlanner):
    """Plans by the tensors that are saved, so that the layout is known, and writes the copies of them."""

    def __init__(self, copies: dict[str, Tensor]) -> None:
        super().__init__()
        self.copies = copies

    def lookup_object(self, index: MetadataIndex) -> Any:
        """The copy of what this rank holds of a tensor; it never holds more than one part of it."""
        return self.copies[index.fqn]
