"""Impossible models are refused with the key that is wrong."""

from dataclasses import replace
from typing import Any

import pytest

from dsv3.config.model import RopeConfig
from dsv3.errors import InvalidValue
from tests.reference import ATTENTION, MODEL, MOE, YARN


def refused(node: Any, **changes: Any) -> str:
    with pytest.raises(InvalidValue) as error:
        replace(node, **changes).validate()
    assert list(changes)[-1] == error.value.key
    return str(error.value)


def test_the_models_of_these_tests_are_possible() -> None:
    for node in (ATTENTION, MOE, MODEL, YARN, RopeConfig(), replace(ATTENTION, q_lora_rank=None)):
        node.validate()


@pytest.mark.parametrize("key", ["heads", "q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "v_head_dim"])
def test_sizes_of_attention_are_above_zero(key: str) -> None:
    assert "must be above 0" in refused(ATTENTION, **{key: 0})


def test_rotated_dims_come_in_pairs() -> None:
    for width in (0, 3, -2):
        assert "must be even" in refused(ATTENTION, qk_rope_head_dim=width)


def test_rope_numbers_are_in_range() -> None:
    refused(YARN, theta=1.0)
    refused(YARN, factor=0.5)
    refused(YARN, original_sequence_length=0)
    refused(YARN, beta_slow=8.0, beta_fast=7.0)
    replace(YARN, beta_slow=8.0, beta_fast=8.0).validate()


def test_experts_and_groups_fit_together() -> None:
    refused(MOE, num_shared_experts=-1)
    refused(MOE, top_k=9)
    assert refused(MOE, num_groups=3).endswith("must divide num_experts=8: 1, 2, 4, 8")
    refused(MOE, top_k_groups=5)
    # Two experts in each of two open groups.
    assert "must be at most 4," in refused(MOE, top_k=5)
    replace(MOE, top_k=4).validate()
    assert "needs its best two" in refused(MOE, top_k=1, num_groups=8)
    replace(MOE, selection_bias=False, top_k=1, num_groups=8).validate()


def test_layers_of_the_model_fit_together() -> None:
    refused(MODEL, num_dense_layers=3)
    refused(MODEL, num_dense_layers=-1)
    refused(MODEL, mtp_depths=-1)
    for key in ("vocab_size", "dim", "num_layers", "dense_hidden_dim"):
        refused(MODEL, **{key: 0})
    for key in ("norm_eps", "latent_norm_eps", "init_std"):
        refused(MODEL, **{key: 0.0})
    assert replace(MODEL, num_layers=5, num_dense_layers=2, mtp_depths=3).num_moe_layers == 6


def test_widths_of_grouped_matmuls_are_whole_multiples_of_16_bytes() -> None:
    assert "nearest: 24, 32" in refused(MODEL, dim=30)
    assert "nearest: 8" in refused(MOE, hidden_dim=6)
