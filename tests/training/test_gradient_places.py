"""The order in which bad gradients are named: the nearest to the loss first, or the largest."""

import math
import random

from dsv3.training.gradient_places import MOST, Place, ranked

TO_THE_LOSS = [
    "embedding.weight",
    "layers.2.attention.o_proj.weight",
    "layers.2.ffn.down_proj.weight",
    "layers.10.attention.o_proj.weight",
    "mtp.0.block.ffn.down_proj.weight",
    "norm.weight",
    "head.weight",
]


def test_a_backward_pass_carries_nan_from_the_place_that_is_named_first() -> None:
    """Pipeline ranks number their parameters each for itself: names go before numbers."""
    places = [Place(name, order, None, math.nan) for order, name in enumerate(TO_THE_LOSS)]
    random.Random(0).shuffle(places)
    assert [place.parameter for place in ranked(places, finite=False)] == TO_THE_LOSS[::-1]
    layers = {place.layer for place in places}
    assert layers == {"embedding", "layers.2", "layers.10", "mtp.0", "norm", "head"}


def test_the_largest_gradient_comes_first_and_shards_of_one_are_added_up() -> None:
    """Two ranks hold a part of expert 1 each; none alone is as large as expert 0."""
    stack = "layers.1.ffn.experts.down_proj"
    places = [Place(stack, 0, 0, 4.0), Place(stack, 0, 1, 3.0), Place(stack, 0, 1, 4.0)]
    first, second = ranked(places, finite=True)
    assert (first.name, first.norm) == (f"{stack}[1]", 5.0)
    assert second.name == f"{stack}[0]"
    many = [Place(f"layers.{n}.norm.weight", n, None, float(n)) for n in range(2 * MOST)]
    assert [place.norm for place in ranked(many, finite=True)] == [*range(2 * MOST - 1, MOST - 1, -1)]
