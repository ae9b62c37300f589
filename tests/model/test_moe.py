"""The MoE layer against a plain loop over tokens and experts, forward and every gradient."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from dsv3.config.model import MoEConfig
from dsv3.model.moe import Experts, MoE, PermuteRows, RowCounts
from tests import reference
from tests.reference import MOE, SOFTMAX_MOE, assert_close, assert_same_gradients, normal

CONFIGS = {
    "v3": MOE,
    "v2 with two shared experts": SOFTMAX_MOE,
    "no shared expert": replace(MOE, num_shared_experts=0),
    "one expert a token": replace(MOE, top_k=1),
    "every expert": replace(MOE, top_k=8, top_k_groups=4),
}


def layer(config: MoEConfig, favourites: tuple[int, ...] = ()) -> MoE:
    """An MoE layer; with `favourites`, every token goes to these."""
    module = MoE(32, config)
    reference.randomize(module)
    if favourites:
        assert module.router.selection_bias is not None
        module.router.selection_bias.fill_(-9.0)[list(favourites)] = 9.0
    return module


def compare(module: MoE, x: Tensor, unused: tuple[str, ...] = ()) -> Tensor:
    """Check output, load, balance term and gradients against the loop; the load."""
    (found, stats), (expected, load, term) = module(x), reference.moe(module, x)
    assert_close(found, expected)
    assert_close(stats.balance_loss, term)
    assert torch.equal(stats.load, load)
    parameters = [p for name, p in module.named_parameters() if name not in unused]
    assert_same_gradients(found, expected, [x, *parameters])
    return load


@pytest.mark.parametrize("name", CONFIGS)
def test_layer_equals_a_loop_over_tokens_and_experts(name: str) -> None:
    config = CONFIGS[name]
    module = layer(config)
    assert (module.shared_experts is None) == (config.num_shared_experts == 0)
    # A single renormalised weight is the route scale whatever the score: the router learns nothing.
    compare(module, normal(2, 9, 32), ("router.weight",) if config.top_k == 1 else ())


def test_experts_without_tokens_get_a_zero_gradient() -> None:
    module = layer(MOE, favourites=(0, 1, 7))
    load = compare(module, normal(2, 9, 32))
    assert load.tolist() == [18.0, 18, 0, 0, 0, 0, 0, 18]
    module(normal(2, 9, 32))[0].square().sum().backward()
    for weight in module.experts.parameters():
        assert weight.grad is not None
        used = [bool(gradient.any()) for gradient in weight.grad]
        assert used == [True, True, False, False, False, False, False, True]


@pytest.mark.parametrize("favourite", [0, 5, 7])
def test_all_tokens_may_go_to_one_expert(favourite: int) -> None:
    module = layer(replace(MOE, top_k=1, num_groups=1, top_k_groups=1), favourites=(favourite,))
    load = compare(module, normal(2, 9, 32), ("router.weight",))
    assert load[favourite] == load.sum() == 18


def test_a_single_token_is_routed() -> None:
    compare(layer(MOE), normal(1, 1, 32))


def test_shared_experts_are_one_feed_forward_as_wide_as_all_of_them() -> None:
    module = layer(replace(MOE, num_shared_experts=3))
    assert module.shared_experts is not None
    assert module.shared_experts.up_proj.weight.shape == (48, 32)


def test_in_bf16_the_layer_stays_close_to_the_loop_and_gradients_come_back_in_fp32() -> None:
    # Norm instead of maximum: bf16 has 8 bits, and errors of single numbers add up.
    module, x = layer(MOE), normal(2, 9, 32).detach().bfloat16().float().requires_grad_()
    expected, load, _ = reference.moe(module, x)
    (found, stats) = module(x.bfloat16())
    assert found.dtype == torch.bfloat16
    assert torch.equal(stats.load, load)
    assert (found.float() - expected).norm() < 0.01 * expected.norm()
    inputs = [x, *module.parameters()]
    weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(3))
    ours = torch.autograd.grad((found.float() * weights).sum(), inputs)
    theirs = torch.autograd.grad((expected * weights).sum(), inputs)
    for mine, right in zip(ours, theirs, strict=True):
        assert mine.dtype == torch.float32
        assert (mine - right).norm() < 0.02 * right.norm()


def test_experts_take_their_own_rows_in_the_order_of_the_counts() -> None:
    experts = Experts(8, replace(MOE, num_experts=4, hidden_dim=8))
    reference.randomize(experts)
    rows, owners = normal(6, 8), [0, 0, 2, 3, 3, 3]
    found = experts(rows, RowCounts(torch.tensor([2, 0, 1, 3])))
    expected = [reference.expert(experts, e, row) for e, row in zip(owners, rows, strict=True)]
    assert_close(found, torch.stack(expected))


@pytest.mark.parametrize("copies", [1, 3])
def test_spread_repeats_rows_in_a_given_order_and_its_gradient_is_exact(copies: int) -> None:
    x = normal(4, 2).detach().double().requires_grad_()
    order = torch.randperm(4 * copies, generator=torch.Generator().manual_seed(0))
    place = order.argsort()

    def spread(x: Tensor) -> Tensor:
        return PermuteRows.apply(x, order, place, copies)  # type: ignore[no-any-return, no-untyped-call]

    assert torch.equal(spread(x), torch.stack([x[n // copies] for n in order.tolist()]))
    assert torch.autograd.gradcheck(spread, (x,))
