"""The move of the selection biases, by hand."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from dsv3.model.router import Router
from dsv3.training.balance import selection_biases, take_load, update_biases
from tests.reference import MOE, SOFTMAX_MOE

FOUR = replace(MOE, num_experts=4, num_groups=1, top_k_groups=1, top_k=2)


def routers(*loads: list[float], bias: bool = True) -> list[Router]:
    """Routers that have counted `loads`."""
    made = [Router(8, replace(FOUR, selection_bias=bias)) for _ in loads]
    for router, load in zip(made, loads, strict=True):
        router.load.copy_(torch.tensor(load))
    return made


def biases(router: Router) -> list[float]:
    assert router.selection_bias is not None
    return router.selection_bias.tolist()


def test_biases_move_by_the_speed_towards_an_even_load() -> None:
    # Means 4 and 2.5: too many tokens moves down, too few up, the mean itself not at all.
    made = routers([10.0, 4, 2, 0], [4.0, 3, 2, 1])
    update_biases(made, torch.tensor([[10.0, 4, 2, 0], [4.0, 3, 2, 1]]), 0.001)
    assert biases(made[0]) == pytest.approx([-0.001, 0, 0.001, 0.001])
    assert biases(made[1]) == pytest.approx([-0.001, -0.001, 0.001, 0.001])
    update_biases(made, torch.tensor([[0.0, 8, 4, 4], [1.0, 1, 1, 1]]), 0.01)
    assert biases(made[0]) == pytest.approx([0.009, -0.01, 0.001, 0.001])
    assert biases(made[1]) == pytest.approx([-0.001, -0.001, 0.001, 0.001])


def test_speed_zero_leaves_the_biases() -> None:
    (router,) = routers([10.0, 4, 2, 0])
    update_biases([router], torch.tensor([[10.0, 4, 2, 0]]), 0.0)
    assert biases(router) == [0.0] * 4


def test_layers_without_a_bias_are_passed_over() -> None:
    made = [*routers([8.0, 0, 0, 0], bias=False), *routers([0.0, 8, 0, 0])]
    update_biases(made, torch.tensor([[8.0, 0, 0, 0], [0.0, 8, 0, 0]]), 0.5)
    assert made[0].selection_bias is None
    assert biases(made[1]) == [0.5, -0.5, 0.5, 0.5]
    assert selection_biases(made).tolist() == [[0.5, -0.5, 0.5, 0.5]]
    assert selection_biases([Router(8, SOFTMAX_MOE)]).shape[0] == 0


def test_load_is_reduced_once_for_all_layers_and_the_counters_start_again() -> None:
    made = routers([1.0, 2, 3, 4], [5.0, 6, 7, 8])
    seen: list[list[list[float]]] = []

    def reduce(load: Tensor) -> Tensor:
        seen.append(load.tolist())
        return load + torch.tensor([100.0, 0, 0, 0])

    load = take_load(made, reduce)
    assert seen == [[[1, 2, 3, 4], [5, 6, 7, 8]]]
    assert load.tolist() == [[101, 2, 3, 4], [105, 6, 7, 8]]
    assert all(router.load.tolist() == [0] * 4 for router in made)
    assert take_load(made, lambda load: load).tolist() == [[0] * 4] * 2


def test_the_load_taken_stays_as_it_is_when_counting_goes_on() -> None:
    made = routers([1.0, 2, 3, 4])
    load = take_load(made, lambda load: load)
    made[0].load += 7
    assert load.tolist() == [[1, 2, 3, 4]]


def test_a_model_without_experts_has_nothing_to_balance() -> None:
    def reduce(load: Tensor) -> Tensor:
        raise AssertionError

    load = take_load([], reduce)
    assert len(load) == 0
    update_biases([], load, 0.1)
    assert len(selection_biases([])) == 0
