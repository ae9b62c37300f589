"""The model as a run sees it on this rank: its parts, their forward and backward passes, and generation.

Generation keeps the KV cache on every layout. Each rank caches the latents of whole rows for its own layers
(kv_lora_rank + qk_rope_head_dim values per token and layer): tensor ranks, whose heads share the latents,
and context ranks hold the same ones, and so do data-parallel ranks, which all generate the same rows. A
pass needs a multiple of tp tokens per row, the prefill under cp one of 2 x cp x tp; padding fills them up.
"""

from collections.abc import Collection
from contextlib import ExitStack
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from dsv3.config.root import Config
from dsv3.config.strict import build
from dsv3.metrics.progress import phase
from dsv3.model.generation import CachedLogits, TimeLimit, generate, inference
from dsv3.model.kv_cache import LatentCache
from dsv3.model.transformer import Transformer
from dsv3.parallel.mesh import ParallelMesh
from dsv3.parallel.parallelize import build_model
from dsv3.training.step import ForwardBackward, LocalForwardBackward


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
        limit: TimeLimit | None = None,
    ) -> list[list[int]]:
        """Call model/generation.generate on any layout; all ranks call it together."""
        first, multiples = self.model_parts[0], self._multiples()
        capacity = max(map(len, prompts), default=0) + max_tokens + max(multiples) - 1
        layers = [name for part in self.model_parts for name in part.layers]
        cache = LatentCache(first.config, len(prompts), capacity, first.compute_dtype, self.device, layers)
        cached = CachedLogits(self.forward_backward.next_logits, cache, multiples)
        drawing_rank = self._drawing_rank()
        draws = self.mesh is None or self.mesh.world.rank() == drawing_rank
        with ExitStack() as stack:
            work = stack.enter_context(phase("sampling", max_tokens, "tokens", together=True))

            def logits(new: list[list[int]]) -> Tensor | None:
                found = cached(new)
                return found if draws else None

            def share(drawn: Tensor) -> Tensor:
                if self.mesh is not None:
                    drawn = drawn.to(self.device)
                    dist.broadcast(drawn, group=self.mesh.world, group_src=drawing_rank)
                work.advance()
                return drawn

            for part in self.model_parts:
                stack.enter_context(inference(part))
            settings = (max_tokens, temperature, top_p, seed, ends)
            return generate(first, prompts, *settings, logits, share, limit)

    def _multiples(self) -> tuple[int, int]:
        """Return the multiples of tokens per row in the prefill and in a pass that decodes."""
        if self.mesh is None:
            return 1, 1
        cp, tp = self.mesh.degrees.cp, self.mesh.degrees.tp
        return (2 * cp * tp if cp > 1 else tp), tp

    def _drawing_rank(self) -> int:
        """Return the rank that draws the ids: the first with the head, `pp` being the outermost axis."""
        if self.mesh is None:
            return 0
        return self.forward_backward.head_rank * (self.mesh.degrees.world_size // self.mesh.degrees.pp)

    def state_dict(self) -> dict[str, Tensor]:
        """Return this rank's part of a checkpoint: parameters and expert biases by name."""
        return {name: tensor for part in self.model_parts for name, tensor in part.state_dict().items()}


def build_parallel_model(
    config: Config, mesh: ParallelMesh | None, device: torch.device, initial: bool = True
) -> ParallelModel:
    """Build the parts of the configured (and completed) model on this rank, with their initial weights.

    Without `initial` a checkpoint must fill them: no weight is drawn.
    """
    with phase("building the model"):
        if mesh is not None and mesh.degrees.pp > 1:
            return ParallelModel(build(config.parallel.pipeline)(config, mesh, device, initial), mesh, device)
        forward_backward = LocalForwardBackward(
            build_model(config, mesh, device, initial), config.data.document_mask
        )
        return ParallelModel(forward_backward, mesh, device)
