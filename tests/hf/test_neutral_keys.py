"""The lists of keys that change nothing are those that transformers' DeepSeek classes do not compute with."""

import pytest

from dsv3.hf.neutral_keys import NEUTRAL_KEYS, NEUTRAL_ROPE_KEYS, NEUTRAL_ROPE_VALUES, ROPE_KEYS
from dsv3.hf.other_architectures import refuse_other_architecture
from tests.hf import derived_keys

pytest.importorskip("transformers")


def test_neutral_keys_are_those_that_the_classes_take_and_do_not_compute_with() -> None:
    assert derived_keys.neutral_keys() == NEUTRAL_KEYS, "run: python -m tests.hf.derived_keys"


def test_keys_of_the_rotary_embedding_are_those_that_the_functions_read() -> None:
    read = derived_keys.rope_keys()
    # `type` is the older name of rope_type, and DeepSeek's own code has no other rotary embedding.
    assert ROPE_KEYS | NEUTRAL_ROPE_VALUES.keys() == read["yarn"] | {"rope_type", "type"}
    others = set().union(*read.values()) - read["yarn"]
    assert others | {"max_position_embeddings"} == NEUTRAL_ROPE_KEYS


def test_no_key_that_the_classes_compute_with_is_refused_as_one_of_others() -> None:
    """Each is given a value that a key of another architecture could not have switched off."""
    from pathlib import Path

    from dsv3.hf.config_values import HFValues

    for key in derived_keys.keys_computed_with():
        refuse_other_architecture(HFValues(Path("config.json"), {key: 3}))
