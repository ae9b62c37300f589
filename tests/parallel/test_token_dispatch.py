"""Token dispatch: permutations against loops, and every row to its experts and back, once per rank."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3.config.parallel import DispatchBackend
from dsv3.parallel.token_dispatch import Permutation, make_permutation, permute, unpermute
from tests.harness.pool import Pool
from tests.parallel.worker_token_dispatch import EXPERTS, KINDS, dispatch_and_combine

ALL_TO_ALL, DEEPEP = DispatchBackend.all_to_all, DispatchBackend.deepep


@st.composite
def routing_maps(draw: st.DrawFn) -> torch.Tensor:
    """Draw the destinations, of up to 5, of up to 7 rows; unused rows and destinations and no rows too."""
    rows, destinations = draw(st.integers(0, 7)), draw(st.integers(1, 5))
    flags = draw(st.lists(st.booleans(), min_size=rows * destinations, max_size=rows * destinations))
    return torch.tensor(flags, dtype=torch.bool).view(rows, destinations)


def permutation_of(routing_map: torch.Tensor) -> Permutation:
    """Return the permutation, given the numbers that its callers know without a look at the map."""
    most = int(routing_map.sum(1).max()) if len(routing_map) else 1
    return make_permutation(routing_map, max(1, most), int(routing_map.sum()))


@settings(deadline=None, max_examples=200)
@given(routing_maps())
def test_a_permutation_is_that_of_a_loop_over_destinations(routing_map: torch.Tensor) -> None:
    rows, destinations = routing_map.shape
    pairs = [(place, row) for place in range(destinations) for row in range(rows) if routing_map[row, place]]
    permutation = permutation_of(routing_map)
    found = zip(permutation.destination.tolist(), permutation.source.tolist(), strict=True)
    assert list(found) == pairs
    for row, copies in enumerate(permutation.copies_of_row.tolist()):
        assert [copy for copy in copies if copy < len(pairs)] == [
            number for number, (_, source) in enumerate(pairs) if source == row
        ]


@settings(deadline=None, max_examples=100)
@given(routing_maps())
def test_permute_and_unpermute_are_sums_of_copies_in_both_directions(routing_map: torch.Tensor) -> None:
    rows = len(routing_map)
    permutation = permutation_of(routing_map)
    # Integers: sums are exact in any order.
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(-9, 9, (rows, 3), generator=generator).double().requires_grad_()
    copies = torch.randint(-9, 9, (len(permutation.source), 3), generator=generator).double()
    copies.requires_grad_()
    permuted, summed = permute(x, permutation), unpermute(copies, permutation)
    assert torch.equal(permuted, x[permutation.source])
    assert torch.equal(summed, torch.zeros_like(x).index_add(0, permutation.source, copies))
    (gradient_x,) = torch.autograd.grad(permuted, x, copies.detach())
    (gradient_copies,) = torch.autograd.grad(summed, copies, x.detach())
    assert torch.equal(gradient_x, summed.detach())
    assert torch.equal(gradient_copies, permuted.detach())


@pytest.mark.parametrize(
    ("ep", "ranks_per_node", "backend"),
    [
        *((*spread, ALL_TO_ALL) for spread in [(2, None), (8, None), (4, 2), (8, 2), (8, 4)]),
        *((ep, None, DEEPEP) for ep in (2, 4, 8)),
    ],
)
def test_every_token_comes_back_exactly(
    pool: Pool, ep: int, ranks_per_node: int | None, backend: DispatchBackend
) -> None:
    """Expert e multiplies by e + 1: a token at a wrong expert, twice, late or lost gives another number."""
    everything = pool.run(dispatch_and_combine, ep, ranks_per_node, backend)[:ep]
    for kind in KINDS:
        found = [rank[kind] for rank in everything]
        for rank in found:
            routed = slice(None) if rank["is_token"] is None else rank["is_token"]
            # Padding gets zeros, and gives no gradient.
            factors = torch.zeros_like(rank["weights"])
            factors[routed] = rank["experts"][routed] + 1.0
            rank["experts"] = rank["experts"][routed]
            expected = (rank["weights"] * factors).sum(1, keepdim=True)
            assert torch.equal(rank["out"], rank["x"] * expected), kind
            assert torch.equal(rank["x_grad"], expected.expand_as(rank["x"])), kind
            assert torch.equal(rank["weights_grad"], factors * rank["x"].sum(1, keepdim=True)), kind
        # Each expert got the rows of all ranks that chose it.
        chosen = torch.cat([rank["experts"].flatten() for rank in found])
        counts = torch.cat([rank["counts"].on_device for rank in found])
        assert torch.equal(counts, torch.bincount(chosen, minlength=EXPERTS)), kind
        assert counts.tolist() == [rows for rank in found for rows in rank["counts"].on_host], kind
    # A token goes once to a rank (at the first of two levels: to a node), however many experts live there.
    places = ep // ranks_per_node if ranks_per_node else ep
    for kind, rank in ((kind, rank[kind]) for rank in everything for kind in ("random", "padding")):
        reached = [set((experts // (EXPERTS // places)).tolist()) for experts in rank["experts"]]
        assert rank["sent"] == [sum(place in several for several in reached) for place in range(places)]
        assert sum(rank["sent"]) < rank["experts"].numel() or kind == "padding"
