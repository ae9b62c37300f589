"""Compare the configured model with the one that a checkpoint stores, number by number.

Names and shapes of tensors say nothing of a rope base, a YaRN factor, an epsilon, top_k or a scale: with
another one, weights load and compute something else. What is typed as `model.KEY=` may differ and is told;
any other difference is refused.
"""

from collections.abc import Collection, Sequence
from dataclasses import asdict
from enum import Enum
from typing import Any, NamedTuple

from dsv3.config.convergence import Difference, Kind, flatten, kind, shown
from dsv3.config.model import ModelConfig, RopeScaling
from dsv3.errors import UserError

YARN_KEYS = tuple(
    f"model.rope.{name}" for name in ("factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim")
)
"""The keys that act with model.rope.scaling=yarn alone."""

INIT_STD = "model.init_std"
"""A learnt key, because it draws the initial weights. Where weights are loaded, it changes nothing.

Reports and config.json differ on it: DeepSeek-V3 was trained with 0.006, its config.json has 0.02.
"""

_SHOWN = 8
"""The most differences that one message lists."""


class StoredModel(NamedTuple):
    """A model as a checkpoint describes it."""

    where: str
    """The argument that names the checkpoint, such as `checkpoint.load=PATH`."""
    model: ModelConfig


def model_differences(stored: ModelConfig, here: ModelConfig) -> list[Difference]:
    """Return the numbers on which two models differ in what they compute, by keys as they are typed.

    Left out are keys of how it is computed (model.attention.kernel, by the table of config/convergence.py),
    of parts that neither model has, and model.init_std.
    """
    a, b = model_numbers(stored), model_numbers(here)
    return [
        Difference(key, a[key], b[key], Kind.learnt)
        for key in a
        if key in b
        and a[key] != b[key]
        and kind(key) is Kind.learnt
        and key != INIT_STD
        and not key.rpartition(".")[2].startswith("_")  # a class is code, no number
        and (_acts(key, stored) or _acts(key, here))
    ]


def model_numbers(model: ModelConfig) -> dict[str, Any]:
    """Return every value of a model by its key as it is typed, enums by name."""
    values = flatten(asdict(model)).items()
    return {f"model.{key}": value.name if isinstance(value, Enum) else value for key, value in values}


def _acts(key: str, model: ModelConfig) -> bool:
    """Return True where a key acts on what a model computes."""
    if key in YARN_KEYS:
        return model.rope.scaling is RopeScaling.yarn
    if key.startswith("model.moe."):
        return model.num_moe_layers > 0
    return key != "model.dense_hidden_dim" or model.num_dense_layers > 0


def require_stored_numbers(
    stored: StoredModel, here: ModelConfig, typed: Collection[str], sources: Sequence[str]
) -> list[str]:
    """Return a line on the numbers that were typed other than a checkpoint has them.

    Args:
        stored: the model of the checkpoint.
        here: the configured model.
        typed: the keys that the command sets, each number by its own.
        sources: the other arguments that the model comes from, such as `model=16b`.

    Raises:
        UserError: a number differs that was not typed; both values, and what to type.
    """
    found = model_differences(stored.model, here)
    refused = [each for each in found if each.key not in typed]
    if refused:
        raise UserError(_refusal(stored.where, refused, sources))
    if not found:
        return []
    if here.num_layers < stored.model.num_layers and here.mtp_depths and stored.model.mtp_depths:
        raise UserError(
            f"model.num_layers={here.num_layers} leaves out layers of {stored.where}, and its MTP layers "
            f"follow the last of {stored.model.num_layers}: leave these out too, model.mtp_depths=0"
        )
    changes = ", ".join(f"{each}{_left_out(each)}" for each in found)
    return [f"{stored.where} is taken with other numbers, as typed: {changes}"]


def _refusal(where: str, refused: Sequence[Difference], sources: Sequence[str]) -> str:
    """Return two lines: the numbers that differ, and what to type."""
    source = " ".join(sources) or "the command"
    told = [f"{each.key} is {shown(each.a)} there, {shown(each.b)} here" for each in refused[:_SHOWN]]
    more = f"; and {len(refused) - _SHOWN} more" if len(refused) > _SHOWN else ""
    first = refused[0]
    by_name = f"{first.key}={shown(first.a)} takes the checkpoint's, {first.key}={shown(first.b)} this one"
    each = "type the number that counts" if len(refused) == 1 else "type each number that counts"
    # An experiment may set single numbers, so that leaving its model out would not be enough.
    out = "" if not sources or any("experiments=" in each for each in sources) else f"leave {source} out, or "
    return f"{where} has other numbers than {source}: {'; '.join(told)}{more}\n{out}{each}: {by_name}"


def _left_out(difference: Difference) -> str:
    """Return how many layers of the checkpoint a difference leaves out; nothing for any other one."""
    what = {"model.num_layers": "layer", "model.mtp_depths": "MTP layer"}.get(difference.key)
    count = difference.a - difference.b if what else 0
    if count <= 0:
        return ""
    if difference.a == 1:
        return f" (leaves out its {what})"
    return f" (leaves out the last {f'{count} ' * (count > 1)}of {difference.a} {what}s)"
