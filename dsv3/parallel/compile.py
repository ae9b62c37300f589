"""torch.compile of each layer's forward.

Token dispatch stays uncompiled, because the rows per expert change with every batch.
"""

import shutil

import torch

from dsv3.config.parallel import CompileBackend
from dsv3.distributed.torch_private import keep_saved_tensors_when_compiled
from dsv3.errors import UserError
from dsv3.model.moe import MoE, TokenDispatcher
from dsv3.model.transformer import Block, Transformer


class Compile:
    """Wrapper that compiles each layer in place when `enabled`."""

    def __init__(self, enabled: bool, backend: CompileBackend) -> None:
        self.enabled = enabled
        self.backend = backend

    def __call__(self, model: Transformer, device: torch.device, splits_backward: bool = False) -> None:
        """Wrap the layers of `model`.

        `splits_backward` says that the pipeline schedule computes the gradients of inputs and of weights in
        two passes. Raise UserError where inductor would generate CPU code without a C++ compiler.
        """
        if not self.enabled:
            return
        generates_cpu_code = self.backend is CompileBackend.inductor and device.type == "cpu"
        if generates_cpu_code and not has_compiler():
            raise UserError(
                "compile=on needs a C++ compiler on CPU (g++ or clang++): install one or use compile=off"
            )
        if splits_backward:
            # With donated buffers the first pass would overwrite saved activations that the second one needs;
            # PyTorch refuses to run it twice.
            keep_saved_tensors_when_compiled()
        for module in model.modules():
            if isinstance(module, MoE):
                # Rows per expert change with every batch, and grouped_mm in fp32 does not trace on CPU.
                module.dispatcher = UncompiledTokenDispatcher(module.dispatcher)
            if isinstance(module, Block):
                module.forward = torch.compile(module.forward, backend=self.backend.value)  # type: ignore[method-assign]


def has_compiler() -> bool:
    """Return True if this machine has a C++ compiler, which inductor needs to generate code for CPU."""
    return any(map(shutil.which, ("g++", "clang++")))


class UncompiledTokenDispatcher:
    """The same dispatcher, skipped by torch.compile."""

    def __init__(self, dispatcher: TokenDispatcher) -> None:
        self.dispatch = torch.compiler.disable(dispatcher.dispatch)
        self.combine = torch.compiler.disable(dispatcher.combine)
