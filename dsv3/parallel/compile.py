"""torch.compile, a layer at a time."""

import shutil

import torch

from dsv3.config.parallel import CompileBackend
from dsv3.errors import UserError
from dsv3.model.moe import Dispatcher, MoE
from dsv3.model.transformer import Block, Transformer


class Compile:
    """Compiles each layer in place when enabled."""

    def __init__(self, enabled: bool, backend: CompileBackend) -> None:
        self.enabled = enabled
        self.backend = backend

    def __call__(self, model: Transformer, device: torch.device, splits_backward: bool = False) -> None:
        """Wrap the layers of `model`; without a C++ compiler CPU code cannot be generated (UserError).

        `splits_backward`: a schedule asks for the gradients of inputs and of weights one after the other.
        """
        if not self.enabled:
            return
        writes_code = self.backend is CompileBackend.inductor and device.type == "cpu"
        if writes_code and not has_compiler():
            raise UserError(
                "compile=on needs a C++ compiler on CPU (g++ or clang++): install one or use compile=off"
            )
        if splits_backward:
            # Else the first pass would overwrite saved activations that the second one needs, and refuses.
            torch._functorch.config.donated_buffer = False
        for module in model.modules():
            if isinstance(module, MoE):
                # Rows an expert change with every batch, and grouped_mm in fp32 does not trace on CPU.
                module.dispatcher = Uncompiled(module.dispatcher)
            if isinstance(module, Block):
                module.forward = torch.compile(module.forward, backend=self.backend.value)  # type: ignore[method-assign]


def has_compiler() -> bool:
    """Whether a C++ compiler is there, which inductor's code for CPU needs."""
    return any(map(shutil.which, ("g++", "clang++")))


class Uncompiled:
    """A dispatcher that compilation passes by."""

    def __init__(self, dispatcher: Dispatcher) -> None:
        self.dispatch = torch.compiler.disable(dispatcher.dispatch)
        self.combine = torch.compiler.disable(dispatcher.combine)
