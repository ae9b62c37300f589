"""Activation checkpointing: each layer keeps its input and recomputes its activations in the backward pass.

The config group `recompute` chooses the mode. `full` keeps nothing but a layer's input. `selective` is
selective activation checkpointing (SAC): it also keeps the results of a few costly ops. SAC_SAVE_LIST has
the ops kept by selective recomputation.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from dsv3.config.parallel import RecomputeMode, SavedOp
from dsv3.distributed.torch_private import DispatchMode, map_tensors
from dsv3.model.transformer import Block, Transformer

SAC_SAVE_LIST = {
    SavedOp.attention: [
        "dsv3.blocked_attention",
        "aten._scaled_dot_product_flash_attention",
        "aten._scaled_dot_product_flash_attention_for_cpu",
        "aten._scaled_dot_product_efficient_attention",
        "aten._scaled_dot_product_cudnn_attention",
        "aten._scaled_dot_product_fused_attention_overrideable",
        # PyTorch's causal bias calls this one by itself (parallel/prefix_attention.py in fp32).
        "aten._efficient_attention_forward",
        "aten._flash_attention_forward",
        "aten._cudnn_attention_forward",
        "torch_attn._varlen_attn",
    ],
    SavedOp.experts: ["aten._grouped_mm", "dsv3.fp8_grouped_linear"],
    SavedOp.exchange: ["_c10d_functional.all_to_all_single"],
    SavedOp.matmuls: ["aten.mm", "dsv3.exact_linear", "dsv3.fp8_linear"],
}
"""The SAC save list: the ops kept by selective recomputation, for each choice of `recompute.keep`.

Attention: every fused kernel has an op here. SDPA's math path has none (its ops are those of any matmul and
softmax), nor has flex_attention, whose compiled code is no op; both are computed again.
"""


class ActivationCheckpointing:
    """Wrapper that recomputes whole layers (`full`), all but some ops of them (`selective`), or nothing."""

    def __init__(self, mode: RecomputeMode, keep: Sequence[SavedOp] = ()) -> None:
        self.mode = mode
        self.keep = keep

    def __call__(self, model: Transformer) -> None:
        """Wrap the layers' forward in place; the names of modules and parameters do not change."""
        if self.mode is RecomputeMode.none:
            return
        # Nothing in a layer draws random numbers, so their state need not be kept.
        options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
        if self.mode is RecomputeMode.selective:
            options["context_fn"] = self._save_and_replay
        for module in model.modules():
            if isinstance(module, Block):
                module.forward = partial(checkpoint, module.forward, **options)  # type: ignore[method-assign]

    def _save_and_replay(self) -> tuple[DispatchMode, DispatchMode]:
        """Return the modes under which a layer's forward pass and its recomputation run."""
        saved: dict[Any, list[Any]] = {op: [] for op in ops_to_save(self.keep)}
        return _SaveResults(saved), _ReplayResults(saved)


class _SaveResults(DispatchMode):
    """Dispatch mode that saves the results of some ops, in the order of their calls.

    PyTorch's own selective activation checkpointing expects the recomputation to call every op of the region
    in the same order. FSDP's all-gathers within the region break that order.
    """

    def __init__(self, saved: dict[Any, list[Any]]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.saved = saved

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Let compiled layers run compiled under this mode, which still sees the ops that they call."""
        return True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func in self.saved:
            self.saved[func].append(map_tensors(Tensor, Tensor.detach, out))
        return out


class _ReplayResults(_SaveResults):
    """Dispatch mode that returns the saved results instead of computing them again."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in self.saved:
            return self.saved[func].pop(0)
        return func(*args, **(kwargs or {}))


def ops_to_save(keep: Sequence[SavedOp]) -> list[Callable[..., Any]]:
    """Return the ops of `keep` in SAC_SAVE_LIST that this build of PyTorch has."""
    names = [name.split(".") for choice in keep for name in SAC_SAVE_LIST[choice]]
    found = [getattr(getattr(torch.ops, namespace), name, None) for namespace, name in names]
    return [op.default for op in found if op is not None]
