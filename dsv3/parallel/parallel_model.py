"""Next-token logits of a model whose rows, vocabulary or layers are split over ranks.

A model spread over ranks: what this rank has of it, and how a step's passes go through it.
"""

from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from dsv3.config.root import Config
from dsv3.config.strict import build
from dsv3.model.generation import generate, inference
from dsv3.model.router import Router
from dsv3.model.transformer import Transformer
from dsv3.parallel.mesh import ParallelMesh
from dsv3.parallel.parallelize import build_model
from dsv3.training.forward_backward import ForwardBackward, LocalForwardBackward, placed_routers


class RecomputedLogits:
    """Every call passes the whole rows through the model again: exact on any layout, and slow."""

    def __init__(
        self, forward_backward: ForwardBackward, rows: int, multiple: int, device: torch.device
    ) -> None:
        self.forward_backward = forward_backward
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
        logits = self.forward_backward.logits(tokens.to(self.device))
        last = torch.tensor([len(ids) - 1 for ids in self.ids], device=self.device)
        return logits[torch.arange(len(last), device=self.device), last]


@dataclass
class ParallelModel:
    """The parts of the model on this rank - one, or several stages of a pipeline - and their passes."""

    forward_backward: ForwardBackward
    mesh: ParallelMesh | None
    device: torch.device

    @property
    def parts(self) -> list[Transformer]:
        """What this rank has of the model."""
        return self.forward_backward.parts

    @cached_property
    def routers(self) -> dict[int, Router]:
        """The routers here by their place among all MoE layers."""
        return placed_routers(self.parts)

    def named_parameters(self) -> dict[str, nn.Parameter]:
        """The parameters here by their name in the whole model."""
        return {name: p for part in self.parts for name, p in part.named_parameters()}

    def generate(
        self,
        prompts: list[list[int]],
        most: int,
        temperature: float,
        top_p: float,
        seed: int,
        end: int | None,
    ) -> list[list[int]]:
        """model/generation.generate on any layout, all ranks together."""
        logits = None
        if self.mesh is not None and self.mesh.degrees.splits_rows:
            multiple = 2 * self.mesh.degrees.cp * self.mesh.degrees.tp
            logits = RecomputedLogits(self.forward_backward, len(prompts), multiple, self.device)
        with ExitStack() as stack:
            for part in self.parts:
                stack.enter_context(inference(part))
            return generate(self.parts[0], prompts, most, temperature, top_p, seed, end, logits)

    def named_tensors(self) -> dict[str, Tensor]:
        """What a checkpoint keeps of the model: parameters and selection biases."""
        return {name: tensor for part in self.parts for name, tensor in part.state_dict().items()}


def build_parallel_model(config: Config, mesh: ParallelMesh | None, device: torch.device) -> ParallelModel:
    """Build the configured (and completed) model on this rank with its initial weights."""
    if mesh is not None and mesh.degrees.pp > 1:
        return ParallelModel(build(config.parallel.pipeline)(config, mesh, device), mesh, device)
    forward_backward = LocalForwardBackward(build_model(config, mesh, device), config.data.document_mask)
    return ParallelModel(forward_backward, mesh, device)
