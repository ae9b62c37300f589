"""Choose the tensors of an export that are written in fp8, and say in quantization_config which are not.

DeepSeek's releases round a scale grid up: 576 rows in blocks of 128 have five scales per column, the last one
for 64 rows. transformers (seen in 5.23) takes for the rows of a block what the grid's shape suggests, 576 / 5
or 192 / 2. It refuses the first and misreads the second, and joins experts without regard to half blocks.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from dsv3.config.convert import Unaligned
from dsv3.errors import UserError
from dsv3.hf.names import HFTensor, is_fp8_weight

_LAYER = re.compile(r"model\.layers\.(\d+)(?=\.|$)")

_EXPERT = re.compile(r"(mlp\.experts)\.\d+\..+")

_FUSED = {
    "self_attn.q_a_proj": "self_attn.kv_a_proj_with_mqa",
    "mlp.up_proj": "mlp.gate_proj",
    "mlp.shared_experts.up_proj": "mlp.shared_experts.gate_proj",
}
"""Matrices that inference engines join with another one: both are in fp8 or neither is."""


@dataclass(frozen=True)
class Fp8Choice:
    """The HF tensors of an export that are written in fp8, and those that could be and are not."""

    names: frozenset[str]
    """Names of the tensors in fp8."""
    kept: tuple[str, ...]
    """Modules left in bf16, as transformers names them: the experts of a layer are one."""
    misread: dict[tuple[str, tuple[int, ...]], int]
    """Tensors in fp8 that transformers misreads or refuses, counted by name (* for numbers) and shape."""

    @classmethod
    def of(
        cls,
        tensors: Sequence[HFTensor],
        block: tuple[int, int],
        unaligned: Unaligned,
        came: Callable[[str], bool] = lambda name: False,
    ) -> "Fp8Choice":
        """Return the choice: what `came` in fp8, or where nothing did, what DeepSeek releases in fp8.

        With unaligned=bf16 a module is not in fp8 if it, or one that it is joined with, has a side that is no
        multiple of a block's. UserError where that leaves none.
        """
        fitting = [tensor for tensor in tensors if is_fp8_weight(tensor.name)]
        wanted = {tensor.name for tensor in fitting if came(tensor.name)}
        wanted = wanted or {tensor.name for tensor in fitting}
        if unaligned is Unaligned.bf16:
            odd = {_joined(tensor.name) for tensor in fitting if not _aligned(tensor, block)}
            wanted = {name for name in wanted if _joined(name) not in odd}
        if not wanted:
            sides = " x ".join(map(str, block))
            raise UserError(
                f"fp8.unaligned=bf16 leaves nothing in fp8: no weight fills blocks of {sides}; use dtype=bf16"
            )
        kept = dict.fromkeys(_module(tensor.name) for tensor in fitting if tensor.name not in wanted)
        misread: dict[tuple[str, tuple[int, ...]], int] = {}
        for tensor in fitting:
            if tensor.name in wanted and _is_misread(tensor, block):
                kind = (re.sub(r"\.\d+\.", ".*.", tensor.name), tensor.shape)
                misread[kind] = misread.get(kind, 0) + 1
        return cls(frozenset(wanted), tuple(kept), misread)

    def warning(self) -> str | None:
        """Return what the user must know of tensors that transformers does not read as they are written."""
        if not self.misread:
            return None
        told = [f"{name} {list(shape)} ({count})" for (name, shape), count in self.misread.items()]
        return (
            f"transformers 5 misreads or refuses the fp8 scales of {sum(self.misread.values()):,} tensors, "
            f"whose sides are no multiples of a block: {', '.join(told)}; "
            "fp8.unaligned=bf16 leaves them in bf16, which every reader reads alike"
        )

    def quantization_config(self, known: dict[str, Any], layers: int) -> dict[str, Any]:
        """Return `known`, the config that the weights came with, with the modules that are in bf16 now.

        `layers` counts the layers of the model with its MTP depths; entries for others are left out.
        """
        key = "modules_to_not_convert" if "modules_to_not_convert" in known else "ignored_layers"
        given = known.get(key)
        before = [entry for entry in given if isinstance(entry, str)] if isinstance(given, list) else []
        modules = {_module(name) for name in self.names}
        fits = [entry for entry in before if _layer_number(entry) < layers]
        listed = [entry for entry in fits if not any(_covers(entry, module) for module in modules)]
        missing = [module for module in self.kept if not any(_covers(entry, module) for entry in listed)]
        if missing and not before:  # with a list of its own, transformers leaves no other module out
            listed.append("lm_head")
        if [*listed, *missing] == before:
            return dict(known)
        values = {name: value for name, value in known.items() if name != "ignored_layers"}
        return values | {"modules_to_not_convert": [*listed, *missing]}


def _module(name: str) -> str:
    """Return the module of a weight in transformers' model; the experts of a layer are one module."""
    return _EXPERT.sub(r"\1", name.removesuffix(".weight"))


def _joined(name: str) -> str:
    """Return the name that is common to the modules that a reader joins."""
    module = _module(name)
    layer = _LAYER.match(module)
    assert layer is not None  # no others are in fp8
    inside = module[layer.end() + 1 :]
    return f"{layer[0]}.{_FUSED.get(inside, inside)}"


def _aligned(tensor: HFTensor, block: tuple[int, int]) -> bool:
    return all(length % side == 0 for length, side in zip(tensor.shape, block, strict=True))


def _is_misread(tensor: HFTensor, block: tuple[int, int]) -> bool:
    """Return whether transformers reads other values than are written, or none.

    A single scale per side is read right, but for the gate and up matrices of experts, which it joins.
    """
    sides = zip(tensor.shape, block, strict=True)
    several = any(length % side and length > side for length, side in sides)
    joined = ".experts." in tensor.name and not tensor.name.endswith("down_proj.weight")
    return several or (joined and tensor.shape[0] % block[0] != 0)


def _layer_number(entry: str) -> int:
    """Return the number of the layer that an entry of modules_to_not_convert names, else -1."""
    found = _LAYER.match(entry)
    return int(found[1]) if found else -1


def _covers(entry: str, module: str) -> bool:
    """Return whether an entry leaves a module, or part of it, out of fp8."""
    within = module.startswith(f"{entry}.") or entry.startswith(f"{module}.")
    return within or module.endswith(entry)
