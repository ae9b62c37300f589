import math

import pytest
import torch

from dsv3.metrics.expert_load import bias_range, entropy, max_violation


def test_violation_is_that_of_the_worst_layer() -> None:
    load = torch.tensor([[5, 5, 5, 5], [1, 1, 1, 5], [4, 4, 4, 8]])
    assert max_violation(load).item() == pytest.approx(5 / 2 - 1)


def test_violation_of_one_expert_for_all_is_their_number_less_one() -> None:
    assert max_violation(torch.tensor([[0, 0, 9, 0]])).item() == pytest.approx(3.0)


def test_entropy_is_the_mean_over_layers_in_units_of_log_experts() -> None:
    load = torch.tensor([[3, 3, 3, 3], [0, 9, 0, 0], [4, 4, 0, 0]])
    assert entropy(load).item() == pytest.approx((1 + 0 + 0.5) / 3)


def test_entropy_of_an_uneven_load_against_the_closed_form() -> None:
    load = torch.tensor([[1, 2, 5]])
    expected = -sum(p * math.log(p) for p in (1 / 8, 2 / 8, 5 / 8)) / math.log(3)
    assert entropy(load).item() == pytest.approx(expected)


def test_layers_without_load_count_as_even() -> None:
    assert max_violation(torch.zeros(2, 4)).item() == 0
    assert entropy(torch.zeros(2, 4)).item() == 1
    assert entropy(torch.tensor([[7]])).item() == 1


def test_bias_range_is_that_of_the_widest_layer() -> None:
    bias = torch.tensor([[0.1, 0.2], [-0.5, 0.25], [0.0, 0.0]])
    assert bias_range(bias).item() == pytest.approx(0.75)


@pytest.mark.parametrize("measure", [max_violation, entropy, bias_range])
def test_nothing_reads_a_value_on_the_host(measure: object) -> None:
    assert callable(measure)
    result = measure(torch.zeros(3, 8, device="meta", dtype=torch.int64))  # a read would raise here
    assert result.shape == ()
    assert result.dtype == torch.float32
