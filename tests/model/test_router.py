"""The router by hand-made scores, against a brute-force choice, and eq. 17 to 20 on paper."""

from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from dsv3.config.model import MoEConfig, ScoreFunction
from dsv3.model.router import Router
from tests import reference
from tests.reference import MOE, SOFTMAX_MOE, assert_close, normal

CONFIGS = {
    "v3": MOE,
    "v2": SOFTMAX_MOE,
    "ungrouped": replace(MOE, num_groups=1, top_k_groups=1),
    "sigmoid without bias": replace(MOE, selection_bias=False),
    "softmax with bias": replace(SOFTMAX_MOE, selection_bias=True, normalize_top_k=True),
    "all groups open": replace(MOE, top_k_groups=4),
}
FOUR = MoEConfig(
    num_experts=4,
    top_k=2,
    num_shared_experts=0,
    hidden_dim=4,
    score_function=ScoreFunction.softmax,
    normalize_top_k=False,
)


def router_of(config: MoEConfig, dim: int = 32, seed: int = 0) -> Router:
    router = Router(dim, config)
    reference.randomize(router, seed)
    return router


def identity_router(config: MoEConfig, bias: list[float] | None = None) -> Router:
    """A router whose logits are its input."""
    router = Router(config.num_experts, config)
    router.weight.data = torch.eye(config.num_experts)
    if bias is not None:
        assert router.selection_bias is not None
        router.selection_bias.copy_(torch.tensor(bias))
    return router


def logits_of(scores: list[float]) -> Tensor:
    """One token whose softmax scores are proportional to `scores`."""
    return torch.tensor(scores).log().view(1, 1, -1)


def chosen(router: Router, scores: list[float]) -> set[int]:
    return set(router(logits_of(scores)).experts.flatten().tolist())


@pytest.mark.parametrize("name", CONFIGS)
def test_choice_and_weights_equal_a_brute_force_search(name: str) -> None:
    config = CONFIGS[name]
    router, x = router_of(config), normal(3, 20, 32).detach()
    routing = router(x)
    assert routing.experts.shape == routing.weights.shape == (60, config.top_k)
    bias = None if router.selection_bias is None else router.selection_bias.tolist()
    assert (bias is not None) == config.selection_bias
    for token, vector in enumerate(x.flatten(0, 1)):
        scores = reference.affinities(router, vector)
        expected = reference.choose(scores.tolist(), bias, config)
        found = dict(zip(routing.experts[token].tolist(), routing.weights[token].tolist(), strict=True))
        assert set(found) == set(expected)
        total = sum(scores[e].item() for e in expected) if config.normalize_top_k else 1.0
        for e in expected:
            weight = config.route_scale * scores[e].item() / total
            assert found[e] == pytest.approx(weight, rel=1e-5)


def test_sigmoid_scores_each_expert_by_itself_and_softmax_against_the_others() -> None:
    x = torch.tensor([[[2.0, 0.0, -1.0, -3.0]]])
    for function, expected in (
        (ScoreFunction.sigmoid, [0.880797, 0.5]),
        (ScoreFunction.softmax, [0.839024, 0.113550]),
    ):
        routing = identity_router(replace(FOUR, score_function=function, selection_bias=False))(x)
        assert sorted(routing.weights.flatten().tolist(), reverse=True) == pytest.approx(expected, abs=1e-5)


def test_groups_score_by_the_sum_of_their_best_two_with_a_bias_and_by_their_best_without() -> None:
    # Group 0 holds the best expert, group 1 the best two together.
    scores = [0.45, 0.02, 0.28, 0.25]
    grouped = replace(FOUR, num_groups=2, top_k_groups=1)
    assert chosen(identity_router(grouped), scores) == {2, 3}
    assert chosen(identity_router(replace(grouped, selection_bias=False)), scores) == {0, 1}


def test_a_group_scores_by_its_best_two_and_not_by_its_sum() -> None:
    eight = replace(FOUR, num_experts=8, num_groups=2, top_k_groups=1)
    scores = [0.2, 0.2, 0.01, 0.01, 0.15, 0.15, 0.14, 0.14]
    assert chosen(identity_router(eight), scores) == {0, 1}


def test_groups_are_judged_by_biased_scores() -> None:
    grouped = replace(FOUR, num_groups=2, top_k_groups=1)
    scores = [0.3, 0.3, 0.2, 0.2]
    assert chosen(identity_router(grouped), scores) == {0, 1}
    assert chosen(identity_router(grouped, [0.0, 0.0, 0.5, 0.0]), scores) == {2, 3}


def test_closed_groups_stay_closed_when_every_open_score_is_negative() -> None:
    grouped = replace(FOUR, num_groups=2, top_k_groups=1)
    router = identity_router(grouped, [-9.0, -10.0, -20.0, -20.0])
    assert chosen(router, [0.25, 0.25, 0.3, 0.2]) == {0, 1}


def test_the_bias_changes_the_choice_and_never_the_weights() -> None:
    scores = [0.4, 0.3, 0.2, 0.1]
    router = identity_router(FOUR, [0.0, 0.0, 0.0, 5.0])
    routing = router(logits_of(scores))
    found = dict(zip(routing.experts[0].tolist(), routing.weights[0].tolist(), strict=True))
    assert found == pytest.approx({0: 0.4, 3: 0.1})


@pytest.mark.parametrize("scale", [1.0, 2.5])
def test_weights_are_renormalised_where_the_config_says_so_and_then_scaled(scale: float) -> None:
    scores = [0.4, 0.3, 0.2, 0.1]
    for normalize, expected in ((True, [4 / 7, 3 / 7]), (False, [0.4, 0.3])):
        config = replace(FOUR, normalize_top_k=normalize, route_scale=scale)
        weights = identity_router(config)(logits_of(scores)).weights
        assert sorted(weights[0].tolist(), reverse=True) == pytest.approx([scale * w for w in expected])


def test_scores_that_vanish_do_not_divide_by_zero() -> None:
    config = replace(FOUR, score_function=ScoreFunction.sigmoid, normalize_top_k=True)
    routing = identity_router(config)(torch.full((1, 2, 4), -200.0))
    assert routing.weights.isfinite().all()
    assert routing.stats.balance_loss.isfinite()


def test_routing_stays_in_fp32_under_autocast_and_for_bf16_input() -> None:
    router = router_of(MOE, 64)
    x = normal(2, 30, 64).detach().bfloat16()
    plain = router(x.float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        autocast = router(x.float())
    for routing in (autocast, router(x)):
        assert routing.weights.dtype == torch.float32
        assert routing.stats.balance_loss.dtype == torch.float32
        assert torch.equal(routing.weights, plain.weights)
        assert torch.equal(routing.experts, plain.experts)
        assert torch.equal(routing.stats.balance_loss, plain.stats.balance_loss)


def test_bf16_weights_do_not_make_the_routing_bf16() -> None:
    router, x = router_of(MOE, 64), normal(2, 30, 64).detach()
    router.weight.data = router.weight.data.bfloat16()
    rounded = router_of(MOE, 64)
    rounded.weight.data = router.weight.data.float()
    assert torch.equal(router(x).weights, rounded(x).weights)


@pytest.mark.parametrize("name", CONFIGS)
def test_load_counts_the_tokens_of_each_expert(name: str) -> None:
    routing = router_of(CONFIGS[name])(normal(3, 20, 32))
    counts = Counter(routing.experts.flatten().tolist())
    assert routing.stats.load.tolist() == [counts[e] for e in range(8)]
    assert sum(counts.values()) == 60 * 3


def test_the_bias_is_saved_and_the_load_is_not_and_neither_is_a_parameter() -> None:
    router = router_of(MOE)
    assert set(router.state_dict()) == {"weight", "selection_bias"}
    assert [name for name, _ in router.named_parameters()] == ["weight"]
    assert set(router_of(SOFTMAX_MOE).state_dict()) == {"weight"}


def test_balance_term_by_hand() -> None:
    # Sequence 1: both tokens choose expert 0, f = (2, 0), P = (0.7, 0.3).
    # Sequence 2: one each, f = (1, 1), P = (0.5 (0.6/0.8 + 0.1/0.5), ...), which sum to 1.
    two = replace(FOUR, num_experts=2, top_k=1, selection_bias=False)
    scores = torch.tensor([[[0.8, 0.2], [0.6, 0.4]], [[0.6, 0.2], [0.1, 0.4]]])
    router = Router(2, two)
    assert router.balance_loss(scores[:1]).item() == pytest.approx(1.4)
    assert router.balance_loss(scores[1:]).item() == pytest.approx(1.0)
    assert router.balance_loss(scores).item() == pytest.approx(1.2)
    # Scores are normalised before they are averaged: (0.75 + 0.9) / 2 = 0.825 of expert 0, f = (2, 0).
    unnormalised = torch.tensor([[[0.6, 0.2], [0.09, 0.01]]])
    assert router.balance_loss(unnormalised).item() == pytest.approx(1.65)


def test_balance_term_of_an_even_router_is_one_and_of_a_collapsed_one_experts_over_top_k() -> None:
    router = identity_router(replace(FOUR, selection_bias=False))
    even = 50 * torch.tensor([[1.0, 1, 0, 0], [0, 0, 1, 1]]).repeat(4, 1)
    collapsed = 50 * torch.tensor([[1.0, 1, 0, 0]]).repeat(8, 1)
    assert router(even[None]).stats.balance_loss.item() == pytest.approx(1.0)
    assert router(collapsed[None]).stats.balance_loss.item() == pytest.approx(2.0)


@pytest.mark.parametrize("name", CONFIGS)
def test_balance_term_and_its_gradient_follow_the_equations(name: str) -> None:
    router, x = router_of(CONFIGS[name]), normal(3, 7, 32)
    scores = [[reference.affinities(router, vector) for vector in row] for row in x]
    expected = torch.stack([reference.balance_term(row, 3) for row in scores]).mean()
    found = router(x).stats.balance_loss
    assert_close(found, expected)
    reference.assert_same_gradients(found, expected, [x, router.weight])


def test_balance_term_counts_raw_scores_without_bias_and_group_limit() -> None:
    x = normal(2, 9, 32).detach()
    free = router_of(replace(MOE, selection_bias=False, num_groups=1, top_k_groups=1))
    biased = router_of(MOE)
    biased.weight.data.copy_(free.weight)
    assert biased.selection_bias is not None
    biased.selection_bias.copy_(torch.tensor([9.0, 9, 9, 9, -9, -9, -9, -9]))
    there, here = free(x), biased(x)
    assert not torch.equal(here.stats.load, there.stats.load)
    assert torch.equal(here.stats.balance_loss, there.stats.balance_loss)


@pytest.mark.parametrize("softmax", [False, True])
def test_gradient_of_the_balance_term_equals_finite_differences(softmax: bool) -> None:
    router = Router(6, replace(MOE, num_experts=6, num_groups=1, top_k_groups=1, top_k=2))
    # Logits 0, 0.5, 1 .. shuffled: no small step changes the top-k, so f is fixed.
    draw = torch.Generator().manual_seed(0)
    rows = [torch.randperm(6, generator=draw).double() / 2 for _ in range(8)]
    logits = torch.stack(rows).view(2, 4, 6).requires_grad_()

    def term(logits: Tensor) -> Tensor:
        return router.balance_loss(logits.softmax(-1) if softmax else logits.sigmoid())

    assert torch.autograd.gradcheck(term, (logits,))
    (gradient,) = torch.autograd.grad(term(logits), logits)
    assert gradient.abs().max() > 1e-3


def test_equal_scores_still_give_top_k_different_experts_of_open_groups() -> None:
    grouped = replace(FOUR, num_experts=8, num_groups=4, top_k_groups=2, top_k=3, selection_bias=False)
    router = identity_router(grouped)
    routing = router(torch.zeros(2, 5, 8))
    for experts in routing.experts.tolist():
        assert len(set(experts)) == 3
        assert len({expert // 2 for expert in experts}) == 2
    assert torch.equal(routing.experts, router(torch.zeros(2, 5, 8)).experts)
    assert routing.weights.flatten().tolist() == pytest.approx([1 / 8] * 30)


def test_forced_balance_gives_every_expert_the_same_load_and_its_own_scores() -> None:
    router, x = router_of(replace(MOE, forced_balance=True)), normal(2, 8, 32)
    routing = router(x)
    assert routing.stats.load.tolist() == [16 * MOE.top_k / MOE.num_experts] * MOE.num_experts
    assert all(len(set(experts)) == MOE.top_k for experts in routing.experts.tolist())
    scores = torch.stack([reference.affinities(router, vector) for vector in x.flatten(0, 1)])
    expected = scores.gather(1, routing.experts)
    expected = MOE.route_scale * expected / expected.sum(1, keepdim=True)
    assert_close(routing.weights, expected)


def test_z_loss_by_hand() -> None:
    # log(4 e^0) = 1.386294 and log(3 + e^2) = 2.340752, squared and averaged.
    x = torch.tensor([[[0.0, 0, 0, 0], [0, 0, 0, 2]]])
    expected = (1.3862944**2 + 2.3407516**2) / 2
    router = identity_router(FOUR)
    assert router(x).stats.z_loss.item() == 0
    router.z_loss = True
    assert router(x).stats.z_loss.item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_input_that_is_no_number_is_flagged_and_nothing_hangs(bad: float) -> None:
    router, x = router_of(MOE), normal(1, 6, 32).detach()
    assert bool(router(x).stats.finite)
    x[0, 3, 5] = bad
    routing = router(x)
    assert not bool(routing.stats.finite)
    assert routing.stats.load.sum() == 6 * MOE.top_k
