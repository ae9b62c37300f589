"""Groups of parameters by patterns of their names: without weight decay, with another learning rate, frozen.

A pattern is a file name pattern in which `*` also matches dots. Patterns are checked against the model before
a process starts, and read by training/optimizer.py and by the memory plan.
"""

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from typing import NamedTuple

from dsv3.config.model import ModelConfig
from dsv3.config.optimizer import MuonConfig, OptimizerConfig
from dsv3.errors import UserError, did_you_mean
from dsv3.planning.parameters import Component, every_weight

HIDDEN_MATRICES = (
    Component.attention,
    Component.dense_ffn,
    Component.experts,
    Component.shared_experts,
    Component.mtp_projection,
)
"""The weights that Muon orthogonalises. Embedding, head and router are matrices too, of another kind."""

_ROUTER, _BIAS = "router.weight", "router.selection_bias"


class ParameterGroup(NamedTuple):
    """The settings that the parameters of a group share."""

    decays: bool
    lr_scale: float
    hidden: bool
    """True for matrices of the hidden layers under Muon."""
    fused: int
    """Matrices that are one below the other in the parameter under Muon: gate and up of an expert are 2."""


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Return True where one of `patterns` matches the name of a parameter."""
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def is_frozen(name: str, patterns: Sequence[str]) -> bool:
    """Return True for a parameter or expert bias that is not trained; a bias is frozen with its router."""
    router = name.removesuffix(_BIAS) + _ROUTER if name.endswith(_BIAS) else name
    return matches(name, patterns) or matches(router, patterns)


def parameter_groups(optimizer: OptimizerConfig, model: ModelConfig) -> dict[str, ParameterGroup]:
    """Return the group of each parameter that is trained, by name."""
    groups, muon = {}, isinstance(optimizer, MuonConfig)
    for weight in every_weight(model):
        if is_frozen(weight.name, optimizer.frozen):
            continue
        scale = 1.0
        for pattern, factor in optimizer.lr_scale.items():
            scale *= factor if matches(weight.name, [pattern]) else 1.0
        hidden = muon and weight.component in HIDDEN_MATRICES
        scale *= optimizer.adamw_lr_scale if isinstance(optimizer, MuonConfig) and not hidden else 1.0
        fused = 2 if muon and weight.name.endswith("experts.gate_up_proj") else 1
        groups[weight.name] = ParameterGroup(
            not matches(weight.name, optimizer.no_decay), scale, hidden, fused
        )
    return groups


def check_groups(optimizer: OptimizerConfig, model: ModelConfig) -> None:
    """Raise UserError for a pattern that no name matches, and where nothing is left to train."""
    names = [weight.name for weight in every_weight(model)]
    biases = [name.removesuffix(_ROUTER) + _BIAS for name in names if name.endswith(_ROUTER)]
    biases = biases if model.moe.selection_bias else []
    checked = [("no_decay", optimizer.no_decay, names), ("lr_scale", list(optimizer.lr_scale), names)]
    for key, patterns, known in [*checked, ("frozen", optimizer.frozen, names + biases)]:
        for pattern in patterns:
            if not any(fnmatchcase(name, pattern) for name in known):
                raise UserError(
                    f"optimizer.{key}: no parameter of the model matches '{pattern}'."
                    f"{did_you_mean(pattern, _suggestions(known))} * stands for any characters, dots too"
                )
    if all(is_frozen(name, optimizer.frozen) for name in names):
        raise UserError(f"optimizer.frozen={optimizer.frozen} leaves no parameter to train")


def _suggestions(names: Iterable[str]) -> list[str]:
    """Return names, with and without their last part, and patterns that leave out the number of a layer."""
    found: dict[str, None] = {}
    for name in names:
        parts = name.split(".")
        numberless = ".".join("*" if part.isdigit() else part for part in parts)
        for candidate in (name, numberless):
            pieces = candidate.split(".")
            found |= dict.fromkeys([candidate, *(".".join(pieces[:n]) + ".*" for n in range(1, len(pieces)))])
    return list(found)
