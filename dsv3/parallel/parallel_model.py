"""The model as a run sees it on this rank: its parts, their forward and backward passes, and generation."""

from collections.abc import Collection
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor

from dsv3.config.root import Config
from dsv3.config.strict import build
from dsv3.metrics.progress import phase
from dsv3.model.generation import CachedLogits, NextLogits, generate, inference
from dsv3.model.transformer import Transformer
from dsv3.parallel.mesh import ParallelMesh
from dsv3.parallel.parallelize import build_model
from dsv3.training.step import ForwardBackward, LocalForwardBackward


class UncachedLogits:
    """The NextLogits of a model whose rows, heads or layers are split over ranks: it keeps no KV cache.

    Every call passes the whole rows through the model again: exact on any layout, and slow. Rows are padded
    to a multiple of `multiple` tokens so that the ranks get equal shards.
    """

    def __init__(
        self, forward_backward: ForwardBackward, rows: int, multiple: int, device: torch.device
    ) -> None:
        self.forward_backward = forward_backward
        self.ids: list[list[int]] = [[] for _ in range(rows)]
        self.multiple = multiple
        self.device = device

    def __call__(self, new: list[list[int]]) -> Tensor:
        """Return logits [rows, vocab] for the token after the ids `new` of each row; see NextLogits."""
        for known, ids in zip(self.ids, new, strict=True):
            known += ids
        # Attention is causal: padding on the right changes nothing before it.
        longest = -(-max(map(len, self.ids)) // self.multiple) * self.multiple
        tokens = torch.zeros(len(self.ids), longest, dtype=torch.int64)
        for row, ids in enumerate(self.ids):
            tokens[row, : len(ids)] = torch.tensor(ids)
        logits = self.forward_backward.logits(tokens.to(self.device))
        last = torch.tensor([len(ids) - 1 for ids in self.ids], device=self.device)
        return logits[torch.arange(len(last), device=self.device), last]


@dataclass
class ParallelModel:
    """This rank's parts of the model, one or several pipeline stages, and the passes through them."""

    forward_backward: ForwardBackward
    mesh: ParallelMesh | None
    device: torch.device

    @property
    def model_parts(self) -> list[Transformer]:
        """Return this rank's parts: the whole model, or one Transformer per pipeline stage."""
        return self.forward_backward.model_parts

    def generate(
        self,
        prompts: list[list[int]],
        max_tokens: int,
        temperature: float,
        top_p: float,
        seed: int,
        ends: Collection[int],
    ) -> list[list[int]]:
        """Call model/generation.generate on any layout; all ranks call it together."""
        logits: NextLogits
        if self.mesh is not None and self.mesh.degrees.splits_rows:
            multiple = 2 * self.mesh.degrees.cp * self.mesh.degrees.tp
            logits = UncachedLogits(self.forward_backward, len(prompts), multiple, self.device)
        else:
            capacity = max(map(len, prompts), default=0) + max_tokens
            logits = CachedLogits(self.model_parts[0], len(prompts), capacity)
        with ExitStack() as stack:
            work = stack.enter_context(phase("sampling", max_tokens, "tokens"))

            def counted(new: list[list[int]]) -> Tensor:
                work.advance()
                return logits(new)

            for part in self.model_parts:
                stack.enter_context(inference(part))
            return generate(self.model_parts[0], prompts, max_tokens, temperature, top_p, seed, ends, counted)

    def state_dict(self) -> dict[str, Tensor]:
        """Return this rank's part of a checkpoint: parameters and expert biases by name."""
        return {name: tensor for part in self.model_parts for name, tensor in part.state_dict().items()}


def build_parallel_model(config: Config, mesh: ParallelMesh | None, device: torch.device) -> ParallelModel:
    """Build the parts of the configured (and completed) model on this rank, with their initial weights."""
    with phase("building the model"):
        if mesh is not None and mesh.degrees.pp > 1:
            return ParallelModel(build(config.parallel.pipeline)(config, mesh, device), mesh, device)
        forward_backward = LocalForwardBackward(build_model(config, mesh, device), config.data.document_mask)
        return ParallelModel(forward_backward, mesh, device)
