"""Activation recomputation: a layer keeps its input, and what is dear, and computes the rest again."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import checkpoint

from dsv3.config.parallel import Kept, Recomputed
from dsv3.model.transformer import Block, Transformer

OPERATORS = {
    Kept.attention: [
        "dsv3.blocked_attention",
        "aten._scaled_dot_product_flash_attention",
        "aten._scaled_dot_product_efficient_attention",
        "aten._scaled_dot_product_cudnn_attention",
        "torch_attn._varlen_attn",
    ],
    Kept.experts: ["aten._grouped_mm", "dsv3.fp8_grouped_linear"],
    Kept.exchange: ["_c10d_functional.all_to_all_single"],
    Kept.matmuls: ["aten.mm", "dsv3.fp8_linear"],
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

    def _contexts(self) -> tuple[TorchDispatchMode, TorchDispatchMode]:
        kept: dict[Any, list[Any]] = {operator: [] for operator in operators(self.keep)}
        return _Keep(kept), _Reuse(kept)


class _Keep(TorchDispatchMode):
    """Keeps the results of some operators, in the order of their calls.

    PyTorch's own selective checkpointing wants every operator of the region again in the same order, which
    FSDP's gathering of weights within it does not give.
    """

    def __init__(self, kept: dict[Any, list[Any]]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.kept = kept

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Let compiled layers run compiled under this mode; the operators they call are seen all the same."""
        return True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func in self.kept:
            self.kept[func].append(tree_map_only(Tensor, Tensor.detach, out))
        return out


class _Reuse(_Keep):
    """Gives the kept results instead of computing them again."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in self.kept:
            return self.kept[func].pop(0)
        return func(*args, **(kwargs or {}))


def operators(keep: Sequence[Kept]) -> list[Callable[..., Any]]:
    """The operators of `keep` that this build of PyTorch has."""
    names = [name.split(".") for kept in keep for name in OPERATORS[kept]]
    found = [getattr(getattr(torch.ops, space), name, None) for space, name in names]
    return [operator.default for operator in found if operator is not None]


def _recomputed(forward: Any, contexts: dict[str, Any], *arguments: Any) -> Any:
    # Nothing in a layer draws random numbers, so their state need not be kept.
    return checkpoint(forward, *arguments, use_reentrant=False, preserve_rng_state=False, **contexts)
