import random
from dataclasses import replace

import pytest

from dsv3.config.model import MoEConfig
from dsv3.planning.dispatch_volume import dispatch_levels, dispatch_probability
from tests.planning.presets import preset


def drawn_hits(moe: MoEConfig, experts: int, tokens: int) -> float:
    """The share of random tokens that choose one of the first `experts`."""
    rng, size, hits = random.Random(0), moe.num_experts // moe.num_groups, 0
    for _ in range(tokens):
        groups = rng.sample(range(moe.num_groups), moe.top_k_groups)
        open_to = [group * size + n for group in groups for n in range(size)]
        hits += min(rng.sample(open_to, moe.top_k)) < experts
    return hits / tokens


@pytest.mark.parametrize("name", ["671b", "16b", "236b"])
def test_the_probability_is_that_of_random_choices(name: str) -> None:
    moe = preset(name).moe
    for experts in (
        1,
        moe.num_experts // 16,
        moe.num_experts // 8,
        moe.num_experts // 4,
        moe.num_experts // 2,
    ):
        assert dispatch_probability(moe, experts) == pytest.approx(drawn_hits(moe, experts, 4000), abs=0.03)
    assert dispatch_probability(moe, moe.num_experts) == 1


def test_a_token_goes_once_to_each_rank_that_has_its_experts() -> None:
    moe = preset("16b").moe
    assert dispatch_levels(moe, 1, 8) == []
    # One expert a rank: top_k copies, of which a 64th stays.
    (flat,) = dispatch_levels(moe, 64, None)
    assert flat.rows == pytest.approx(6)
    assert flat.sent == pytest.approx(6 * 63 / 64)
    (two,) = dispatch_levels(moe, 2, 8)
    assert (two.ranks, two.experts) == (2, 32)
    assert 1.9 < two.rows < 2


def test_across_nodes_a_token_crosses_to_a_node_once() -> None:
    moe = preset("671b").moe
    between, within = dispatch_levels(moe, 64, 8)
    assert (between.ranks, within.ranks) == (8, 8)
    assert (between.experts, within.experts) == (32, 4)
    # At most 4 of 8 nodes, as a node is a group here.
    assert 3.5 < between.rows < 4
    assert within.rows == dispatch_levels(moe, 64, None)[0].rows > between.rows
    assert len(dispatch_levels(moe, 64, 48)) == 1


def test_experts_that_are_dealt_round_robin_are_neighbours() -> None:
    """Eight consecutive experts of 256 lie on 2 of 64 ranks, and on one node of 8."""
    dealt = replace(preset("671b").moe, forced_balance=True)
    nodes, ranks = dispatch_levels(dealt, 64, 8)
    assert (nodes.rows, ranks.rows) == (1, 2)
    odd = replace(dealt, num_experts=12, top_k=5, num_groups=1, top_k_groups=1, selection_bias=False)
    chosen = [{(5 * token + n) % 12 // 3 for n in range(5)} for token in range(12)]
    assert dispatch_probability(odd, 3) == pytest.approx(sum(map(len, chosen)) / 12 / 4)
