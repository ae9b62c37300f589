"""Activation recomputation: a layer keeps its input, and what is dear, and computes the rest again."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

import dsv3.model.blocked  # noqa: F401  # registers the operator named below
from dsv3.model.block import Block
from dsv3.model.transformer import Transformer
from dsv3.parallel.config import Kept, Recomputed

OPERATORS = {
    Kept.attention: [
        "dsv3.blocked_attention",
        "aten._scaled_dot_product_flash_attention",
        "aten._scaled_dot_product_efficient_attention",
        "aten._scaled_dot_product_cudnn_attention",
        "torch_attn._varlen_attn",
    ],
    Kept.experts: ["aten._grouped_mm"],
    Kept.exchange: ["_c10d_functional.all_to_all_single"],
    Kept.matmuls: ["aten.mm"],
}
"""The operators whose results selective recomputation keeps, by what they belong to."""


class Recompute:
    """Recomputes whole layers (`full`), layers but for some operators' results (`selective`) or nothing."""

    def __init__(self, mode: Recomputed, keep: Sequence[Kept] = ()) -> None:
        self.mode = mode
        self.keep = keep

    def __call__(self, model: Transformer) -> None:
        """Wrap the layers' forward in place: names of modules and parameters stay as they are."""
        if self.mode is Recomputed.none:
            return
        contexts = {} if self.mode is Recomputed.full else {"context_fn": self._contexts}
        for module in model.modules():
            if isinstance(module, Block):
                module.forward = partial(_recomputed, module.forward, contexts)  # type: ignore[method-assign]

    def _contexts(self) -> Any:
        return create_selective_checkpoint_contexts(operators(self.keep))


def operators(keep: Sequence[Kept]) -> list[Callable[..., Any]]:
    """The operators of `keep` that this build of PyTorch has."""
    names = [name.split(".") for kept in keep for name in OPERATORS[kept]]
    found = [getattr(getattr(torch.ops, space), name, None) for space, name in names]
    return [operator.default for operator in found if operator is not None]


def _recomputed(forward: Any, contexts: dict[str, Any], *arguments: Any) -> Any:
    # Nothing in a layer draws random numbers, so their state need not be kept.
    return checkpoint(forward, *arguments, use_reentrant=False, preserve_rng_state=False, **contexts)
