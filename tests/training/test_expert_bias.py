"""The expert bias (aux-loss-free load balancing), computed by hand."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from dsv3.model.router import Router
from dsv3.training.expert_bias import stack_expert_bias, take_expert_load, update_expert_bias
from tests.reference import MOE, SOFTMAX_MOE

FOUR = replace(MOE, num_experts=4, num_groups=1, top_k_groups=1, top_k=2)


def routers(*loads: list[float], bias: bool = True) -> dict[int, Router]:
    """Return routers by place that have counted `loads`."""
    made = [Router(8, replace(FOUR, selection_bias=bias)) for _ in loads]
    for router, load in zip(made, loads, strict=True):
        router.load.copy_(torch.tensor(load))
    return dict(enumerate(made))


def biases(router: Router) -> list[float]:
    assert router.selection_bias is not None
    return router.selection_bias.tolist()


def test_biases_move_by_the_speed_towards_an_even_load() -> None:
    # Means 4 and 2.5: too many tokens moves down, too few up, the mean itself not at all.
    made = routers([10.0, 4, 2, 0], [4.0, 3, 2, 1])
    update_expert_bias(made, torch.tensor([[10.0, 4, 2, 0], [4.0, 3, 2, 1]]), 0.001)
    assert biases(made[0]) == pytest.approx([-0.001, 0, 0.001, 0.001])
    assert biases(made[1]) == pytest.approx([-0.001, -0.001, 0.001, 0.001])
    update_expert_bias(made, torch.tensor([[0.0, 8, 4, 4], [1.0, 1, 1, 1]]), 0.01)
    assert biases(made[0]) == pytest.approx([0.009, -0.01, 0.001, 0.001])
    assert biases(made[1]) == pytest.approx([-0.001, -0.001, 0.001, 0.001])


def test_speed_zero_leaves_the_biases() -> None:
    router = routers([10.0, 4, 2, 0])[0]
    update_expert_bias({0: router}, torch.tensor([[10.0, 4, 2, 0]]), 0.0)
    assert biases(router) == [0.0] * 4


def test_layers_without_a_bias_are_passed_over() -> None:
    made = {0: routers([8.0, 0, 0, 0], bias=False)[0], 1: routers([0.0, 8, 0, 0])[0]}
    update_expert_bias(made, torch.tensor([[8.0, 0, 0, 0], [0.0, 8, 0, 0]]), 0.5)
    assert made[0].selection_bias is None
    assert biases(made[1]) == [0.5, -0.5, 0.5, 0.5]
    assert stack_expert_bias(made).tolist() == [[0.5, -0.5, 0.5, 0.5]]
    assert stack_expert_bias({0: Router(8, SOFTMAX_MOE)}).tolist() == [[0.0]]


def test_load_is_reduced_once_for_all_layers_and_the_counters_start_again() -> None:
    made = routers([1.0, 2, 3, 4], [5.0, 6, 7, 8])
    seen: list[list[list[float]]] = []

    def reduce(load: Tensor) -> Tensor:
        seen.append(load.tolist())
        return load + torch.tensor([100.0, 0, 0, 0])

    load = take_expert_load(made, (2, 4), reduce)
    assert seen == [[[1, 2, 3, 4], [5, 6, 7, 8]]]
    assert load.tolist() == [[101, 2, 3, 4], [105, 6, 7, 8]]
    assert all(router.load.tolist() == [0] * 4 for router in made.values())
    assert take_expert_load(made, (2, 4), lambda load: load).tolist() == [[0] * 4] * 2


def test_the_load_taken_stays_as_it_is_when_counting_goes_on() -> None:
    made = routers([1.0, 2, 3, 4])
    load = take_expert_load(made, (1, 4), lambda load: load)
    made[0].load += 7
    assert load.tolist() == [[1, 2, 3, 4]]


def test_a_rank_without_some_layers_adds_its_own_in_their_places() -> None:
    mine = routers([1.0, 2, 3, 4], [5.0, 6, 7, 8])
    load = take_expert_load({1: mine[0], 3: mine[1]}, (4, 4), lambda load: load)
    assert load.tolist() == [[0] * 4, [1, 2, 3, 4], [0] * 4, [5, 6, 7, 8]]
    update_expert_bias({1: mine[0]}, load, 0.5)
    assert biases(mine[0]) == [0.5, 0.5, -0.5, -0.5]
    assert biases(mine[1]) == [0.0] * 4
