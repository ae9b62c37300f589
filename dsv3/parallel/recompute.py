"""Activation recomputation: a layer keeps its input and computes the rest again in the backward pass."""

from collections.abc import Sequence
from functools import partial
from typing import Any

from torch.utils.checkpoint import checkpoint

from dsv3.model.block import Block
from dsv3.model.transformer import Transformer
from dsv3.parallel.config import Kept, Recomputed


class Recompute:
    """Recomputes whole layers (`full`) or nothing (`none`)."""

    def __init__(self, mode: Recomputed, keep: Sequence[Kept] = ()) -> None:
        self.mode = mode
        self.keep = keep

    def __call__(self, model: Transformer) -> None:
        """Wrap the layers' forward in place: names of modules and parameters stay as they are."""
        if self.mode is Recomputed.full:
            for module in model.modules():
                if isinstance(module, Block):
                    module.forward = partial(_recomputed, module.forward)  # type: ignore[method-assign]


def _recomputed(forward: Any, *arguments: Any) -> Any:
    # Nothing in a layer draws random numbers, so their state need not be kept.
    return checkpoint(forward, *arguments, use_reentrant=False, preserve_rng_state=False)
