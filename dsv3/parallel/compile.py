"""torch.compile, a layer at a time."""

import shutil

import torch

from dsv3.model.block import Block
from dsv3.model.moe import Dispatcher, MoE
from dsv3.model.transformer import Transformer
from dsv3.runtime.errors import UserError


class Compile:
    """Compiles each layer in place when enabled."""

    def __init__(self, enabled: bool) -> None:
        self.enabled = enabled

    def __call__(self, model: Transformer, device: torch.device) -> None:
        """Wrap the layers of `model`; without a C++ compiler CPU code cannot be generated (UserError)."""
        if not self.enabled:
            return
        if device.type == "cpu" and not any(map(shutil.which, ("g++", "clang++"))):
            raise UserError(
                "compile=on needs a C++ compiler on CPU (g++ or clang++): install one or use compile=off"
            )
        for module in model.modules():
            if isinstance(module, MoE):
                # Rows an expert change with every batch, and grouped_mm in fp32 does not trace on CPU.
                module.dispatcher = Uncompiled(module.dispatcher)
            if isinstance(module, Block):
                module.compile()


class Uncompiled:
    """A dispatcher that compilation passes by."""

    def __init__(self, dispatcher: Dispatcher) -> None:
        self.dispatch = torch.compiler.disable(dispatcher.dispatch)
        self.combine = torch.compiler.disable(dispatcher.combine)
