"""Two models are compared by every number: what is typed may differ and is told, anything else is refused."""

from dataclasses import replace
from enum import Enum
from typing import Any

import pytest

from dsv3.config.model import ModelConfig, RopeScaling
from dsv3.config.model_difference import (
    YARN_KEYS,
    StoredModel,
    model_differences,
    model_numbers,
    require_stored_numbers,
)
from dsv3.errors import UserError
from tests.harness.tiny import model_config

MODEL = model_config("model.rope.scaling=yarn", "model.mtp_depths=2", "model.num_layers=4")
"""A model in which every key acts."""

KEYS = [key for key in model_numbers(MODEL) if not key.rpartition(".")[2].startswith("_")]
"""Every number of the schema, and the choices beside them."""

NOT_COMPARED = {"model.attention.kernel", "model.init_std"}
"""A kernel computes the same function; the weights that init_std would draw are loaded."""


def another(value: Any) -> Any:
    """Return another value of the same type."""
    if isinstance(value, Enum):
        return next(each for each in type(value) if each is not value)
    return not value if isinstance(value, bool) else value * 2 if value else 8


def changed(node: Any, key: str) -> Any:
    """Return a model with another value of `key`, which may be no valid model; a node below it likewise."""
    name, _, rest = key.removeprefix("model.").partition(".")
    value = getattr(node, name)
    return replace(node, **{name: changed(value, rest) if rest else another(value)})


def test_every_number_of_a_model_is_compared() -> None:
    assert len(KEYS) > 30
    for key in KEYS:
        found = [each.key for each in model_differences(MODEL, changed(MODEL, key))]
        assert found == ([] if key in NOT_COMPARED else [key])


def test_a_number_of_a_part_that_neither_model_has_is_not_compared() -> None:
    plain = replace(MODEL, rope=replace(MODEL.rope, scaling=RopeScaling.none))
    dense = replace(MODEL, num_dense_layers=MODEL.num_layers, mtp_depths=0)
    sparse = replace(MODEL, num_dense_layers=0)
    of_moe = [key for key in KEYS if key.startswith("model.moe.")]
    assert len(of_moe) > 8
    for model, keys in ((plain, YARN_KEYS), (dense, of_moe), (sparse, ["model.dense_hidden_dim"])):
        for key in keys:
            assert not model_differences(model, changed(model, key)), key
            # One of the two has it.
            assert key in [each.key for each in model_differences(MODEL, changed(model, key))]


def refusal(here: ModelConfig, typed: list[str], *sources: str) -> str:
    """Return the message that refuses a model over the stored MODEL."""
    with pytest.raises(UserError) as error:
        require_stored_numbers(StoredModel("checkpoint.load=X", MODEL), here, typed, sources)
    message = str(error.value)
    assert len(message.splitlines()) <= 2
    return message


def test_a_difference_is_told_where_it_was_typed_and_refused_with_both_values_elsewhere() -> None:
    for key in set(KEYS) - NOT_COMPARED - {"model.num_layers"}:
        here = changed(MODEL, key)
        (difference,) = model_differences(MODEL, here)
        (note,) = require_stored_numbers(
            StoredModel("checkpoint.load=X", MODEL), here, [key], ["model=debug"]
        )
        assert note.startswith("checkpoint.load=X ")
        assert str(difference) in note
        message = refusal(here, ["model.vocab_sizes", "train.steps"], "model=debug")
        assert f"{key} is {difference.a} there, {difference.b} here".lower() in message.lower()
        assert "leave model=debug out" in message
    assert not require_stored_numbers(StoredModel("checkpoint.load=X", MODEL), MODEL, [], ["model=debug"])


def test_what_is_not_typed_is_refused_beside_what_is() -> None:
    here = replace(changed(MODEL, "model.rope.theta"), norm_eps=1e-5)
    message = refusal(here, ["model.rope.theta"], "model=debug", "experiments=mine")
    assert "model.norm_eps is 1e-06 there, 1e-05 here" in message
    assert "theta" not in message
    # An experiment may have set it, so that leaving the preset out would not be enough.
    assert "leave" not in message
    assert "model.norm_eps=1e-06 takes the checkpoint's, model.norm_eps=1e-05 this one" in message


def test_another_model_altogether_is_told_in_two_short_lines() -> None:
    here = MODEL
    for key in KEYS:
        here = changed(here, key)
    message = refusal(here, [], "model=671b")
    assert f"and {len(KEYS) - len(NOT_COMPARED) - 8} more" in message
    assert len(message) < 1000


def test_layers_that_are_left_out_are_counted_and_mtp_layers_go_first() -> None:
    stored = StoredModel("input=X", MODEL)
    fewer = replace(MODEL, num_layers=1, mtp_depths=0)
    typed = ["model.num_layers", "model.mtp_depths"]
    (note,) = require_stored_numbers(stored, fewer, typed, [])
    assert "model.num_layers 4 -> 1 (leaves out the last 3 of 4 layers)" in note
    assert "model.mtp_depths 2 -> 0 (leaves out the last 2 of 2 MTP layers)" in note
    (note,) = require_stored_numbers(stored, replace(MODEL, num_layers=5), typed, [])
    assert "leaves out" not in note
    with pytest.raises(
        UserError, match=r"model\.num_layers=1 .* the last of 4: .*model\.mtp_depths=0"
    ) as error:
        require_stored_numbers(stored, replace(MODEL, num_layers=1), typed, [])
    assert len(str(error.value).splitlines()) == 1
    with pytest.raises(UserError, match=r"model\.num_layers is 4 there, 1 here"):
        require_stored_numbers(stored, fewer, ["model.mtp_depths"], [])
