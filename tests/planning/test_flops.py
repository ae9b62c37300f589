from dataclasses import replace

import pytest

from dsv3.planning.parameters import (
    FlopsConvention,
    training_flops_by_component,
    training_flops_per_token,
)
from tests.planning.presets import preset

CAUSAL, SQUARE = FlopsConvention.causal, FlopsConvention.full_square


@pytest.mark.parametrize(
    ("name", "convention", "mtp", "expected"),
    [
        ("16b", CAUSAL, False, 16_406_544_384),
        ("16b", SQUARE, False, 18_105_237_504),
        ("671b", CAUSAL, False, 250_449_887_232),
        ("671b", CAUSAL, True, 260_641_652_736),
        ("671b", SQUARE, False, 281_152_192_512),
    ],
)
def test_published_values_at_4096(name: str, convention: FlopsConvention, mtp: bool, expected: int) -> None:
    assert training_flops_per_token(preset(name), 4096, convention, mtp) == expected


def test_only_the_attention_square_grows_with_the_sequence() -> None:
    config = preset("16b")
    none, one, two = (training_flops_per_token(config, length) for length in (0, 1, 2))
    assert two - one == one - none == 3 * 27 * 16 * (192 + 128)
    assert training_flops_per_token(config, 2, SQUARE) - none == 2 * (two - none)


def test_more_experts_cost_their_router_alone_and_more_chosen_ones_their_weights() -> None:
    config = preset("debug")
    base = training_flops_per_token(config, 512)
    wider = replace(config, moe=replace(config.moe, num_experts=32))
    assert training_flops_per_token(wider, 512) - base == 6 * 4 * 16 * 128
    busier = replace(config, moe=replace(config.moe, top_k=5))
    assert training_flops_per_token(busier, 512) - base == 6 * 4 * 3 * 128 * 128


@pytest.mark.parametrize("convention", FlopsConvention)
def test_components_sum_to_the_whole(convention: FlopsConvention) -> None:
    config = preset("671b")
    parts = training_flops_by_component(config, 4096, convention)
    assert sum(parts.values()) == training_flops_per_token(config, 4096, convention)
    # The main model's prediction and that of one MTP depth; 59 layers of 8 experts of 3 matrices.
    assert parts["head"] == 6 * 2 * 129_280 * 7168
    assert parts["experts"] == 6 * 59 * 8 * 3 * 7168 * 2048
    assert parts["scores"] == 62 * 3 * 128 * 320 * 4096 * (1 if convention is CAUSAL else 2)
    assert "embedding" not in parts
