"""RoPE as complex multiplication, YaRN by its definition and by the numbers of the released models."""

import cmath
import math
from dataclasses import replace

import pytest
import torch

from dsv3.config.model import RopeConfig, RopeScaling
from dsv3.model.rope import apply_rotary, inverse_frequencies, rotary_table, softmax_scale, yarn_ramp
from tests import reference
from tests.reference import YARN, assert_close, normal

PLAIN = RopeConfig(theta=10000.0)
V3 = replace(PLAIN, scaling=RopeScaling.yarn, factor=40.0)  # length 4096, beta 32 and 1
KIMI = replace(V3, theta=50000.0, factor=32.0, beta_fast=1.0)


@pytest.mark.parametrize("config", [PLAIN, YARN])
def test_adjacent_pairs_turn_as_complex_numbers(config: RopeConfig) -> None:
    x = normal(2, 7, 3, 8).detach()
    found = apply_rotary(x, rotary_table(config, 8, torch.arange(7)))
    for b in range(2):
        for position in range(7):
            for head in range(3):
                expected = reference.rope(x[b, position, head], position, config)
                assert_close(found[b, position, head], expected, 1e-6)


def test_the_first_position_is_left_alone_and_the_second_turns_by_the_frequency() -> None:
    found = apply_rotary(
        torch.tensor([[[[1.0, 0.0]], [[1.0, 0.0]]]]), rotary_table(PLAIN, 2, torch.arange(2))
    )
    assert found[0, 0, 0].tolist() == [1.0, 0.0]
    assert found[0, 1, 0].tolist() == pytest.approx([math.cos(1), math.sin(1)])


def test_a_table_may_give_each_row_its_own_positions() -> None:
    x, positions = normal(2, 3, 1, 8).detach(), torch.tensor([[0, 1, 2], [7, 9, 40]])
    both = apply_rotary(x, rotary_table(PLAIN, 8, positions))
    for row in range(2):
        alone = apply_rotary(x[row : row + 1], rotary_table(PLAIN, 8, positions[row]))
        assert torch.equal(both[row : row + 1], alone)


@pytest.mark.parametrize("config", [PLAIN, YARN])
def test_products_of_queries_and_keys_depend_on_the_distance_only(config: RopeConfig) -> None:
    q, k = normal(8).detach(), normal(8, seed=5).detach()

    def product(query_at: int, key_at: int) -> float:
        turned = apply_rotary(
            torch.stack([q, k]).view(1, 2, 1, 8), rotary_table(config, 8, torch.tensor([query_at, key_at]))
        )
        return float(turned[0, 0, 0] @ turned[0, 1, 0])

    for distance in (0, 1, 5):
        near = product(distance, 0)
        for start in (1, 13, 100):
            assert product(start + distance, start) == pytest.approx(near, abs=1e-4)
    assert abs(product(1, 0) - product(5, 0)) > 1e-2


def test_rotation_is_computed_in_fp32_and_given_back_in_the_dtype_of_its_input() -> None:
    x, table = normal(1, 50, 2, 8).detach().bfloat16(), rotary_table(PLAIN, 8, torch.arange(50))
    assert table.dtype == torch.float32
    found = apply_rotary(x, table)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, apply_rotary(x.float(), table).bfloat16())


def test_plain_frequencies_are_powers_of_theta_whatever_the_factor() -> None:
    expected = torch.tensor([1.0, 0.1, 0.01, 0.001])
    for factor in (1.0, 40.0):
        config = replace(PLAIN, factor=factor, mscale=0.3)
        assert_close(inverse_frequencies(config, 8), expected, 1e-6)
        assert torch.equal(rotary_table(config, 8, torch.arange(9)), rotary_table(PLAIN, 8, torch.arange(9)))
        assert softmax_scale(config, 192) == pytest.approx(192**-0.5)


def test_yarn_keeps_fast_pairs_and_stretches_slow_ones() -> None:
    plain, stretched = inverse_frequencies(PLAIN, 64), inverse_frequencies(V3, 64)
    turns = plain * 4096 / (2 * math.pi)
    ratio = plain / stretched
    # Bounds are rounded outwards to whole pairs, so one pair beyond each beta may be touched.
    fast, slow = int((turns > 32).sum()), int((turns >= 1).sum())
    assert ratio[: fast - 1].tolist() == [1.0] * (fast - 1)
    assert ratio[slow + 1 :].tolist() == pytest.approx([40.0] * (32 - slow - 1), rel=1e-6)
    assert (ratio[fast : slow + 1].diff() > 0).all()


def test_yarn_ramp_of_deepseek_v3_runs_from_pair_10_to_pair_23() -> None:
    # The bounds that the released configuration_deepseek / modeling code arrives at for dim 64.
    ramp = [0.0] * 11 + [n / 13 for n in range(1, 13)] + [1.0] * 9
    assert yarn_ramp(V3, 64).tolist() == pytest.approx(ramp)
    at_16 = 10000 ** (-0.5)
    expected = at_16 * (7 / 13) + at_16 / 40 * (6 / 13)
    assert inverse_frequencies(V3, 64)[16].item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("config", [V3, YARN, KIMI, replace(V3, beta_fast=8.0, beta_slow=2.0, factor=3.0)])
@pytest.mark.parametrize("rope_dim", [8, 64])
def test_yarn_frequencies_follow_the_written_out_formula(config: RopeConfig, rope_dim: int) -> None:
    expected = [reference.frequency(config, pair, rope_dim) for pair in range(rope_dim // 2)]
    assert inverse_frequencies(config, rope_dim).tolist() == pytest.approx(expected, rel=1e-5)


def test_equal_betas_give_a_step() -> None:
    # Kimi K2: the bound is pair 19.16, between 19 and 20.
    assert yarn_ramp(KIMI, 64).tolist() == [0.0] * 20 + [1.0] * 12
    # Both bounds on pair 0: no division by zero.
    degenerate = replace(KIMI, original_sequence_length=4)
    assert yarn_ramp(degenerate, 8).tolist() == [0.0, 1.0, 1.0, 1.0]


def test_cosines_and_sines_carry_the_ratio_of_the_two_mscales() -> None:
    for mscale, all_dim in ((1.0, 1.0), (0.707, 0.707), (1.0, 0.0), (0.707, 1.0)):
        config = replace(V3, mscale=mscale, mscale_all_dim=all_dim)
        table = rotary_table(config, 8, torch.arange(5))
        ratio = (0.1 * mscale * math.log(40) + 1) / (0.1 * all_dim * math.log(40) + 1)
        assert table.norm(dim=-1).flatten().tolist() == pytest.approx([ratio] * 20, rel=1e-6)
        angle = cmath.phase(complex(*table[1, 0].tolist()))
        assert angle == pytest.approx(inverse_frequencies(config, 8)[0].item())


def test_softmax_scales_of_the_released_models() -> None:
    # V3: mscale 1.3688879; V2-Lite: mscale_all_dim 0.707.
    assert softmax_scale(V3, 192) == pytest.approx(0.0721688 * 1.3688879**2, rel=1e-6)
    lite = replace(V3, mscale=0.707, mscale_all_dim=0.707)
    assert softmax_scale(lite, 192) == pytest.approx(0.0721688 * 1.2608038**2, rel=1e-6)
    assert softmax_scale(replace(V3, mscale=0.2), 192) == softmax_scale(V3, 192)
    assert softmax_scale(replace(V3, factor=1.0), 192) == pytest.approx(192**-0.5)
    assert softmax_scale(PLAIN, 192) == pytest.approx(192**-0.5)
