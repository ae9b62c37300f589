"""Tokens to their experts and back: every row, once a rank, in its order, whatever the routing."""

import pytest
import torch

from dsv3.config.parallel import ExchangeBackend
from tests.parallel.pool import Pool
from tests.parallel.routing import EXPERTS, KINDS, exchanged

ALL_TO_ALL, DEEPEP = ExchangeBackend.all_to_all, ExchangeBackend.deepep


@pytest.mark.parametrize(
    ("ep", "ranks_per_node", "backend"),
    [
        *((*spread, ALL_TO_ALL) for spread in [(2, None), (8, None), (4, 2), (8, 2), (8, 4)]),
        *((ep, None, DEEPEP) for ep in (2, 4, 8)),
    ],
)
def test_every_token_comes_back_exactly(
    pool: Pool, ep: int, ranks_per_node: int | None, backend: ExchangeBackend
) -> None:
    """Expert e multiplies by e + 1: a token at a wrong expert, twice, late or lost gives another number."""
    everything = pool.run(exchanged, ep, ranks_per_node, backend)[:ep]
    for kind in KINDS:
        found = [rank[kind] for rank in everything]
        for rank in found:
            factors = rank["experts"] + 1.0
            expected = (rank["weights"] * factors).sum(1, keepdim=True)
            assert torch.equal(rank["out"], rank["x"] * expected), kind
            assert torch.equal(rank["x_grad"], expected.expand_as(rank["x"])), kind
            assert torch.equal(rank["weights_grad"], factors * rank["x"].sum(1, keepdim=True)), kind
        # Each expert got the rows of all ranks that chose it.
        chosen = torch.cat([rank["experts"].flatten() for rank in found])
        counts = torch.cat([rank["counts"] for rank in found])
        assert torch.equal(counts, torch.bincount(chosen, minlength=EXPERTS)), kind
    # A token goes to a rank (of two exchanges the first: to a node) once, however many experts live there.
    places = ep // ranks_per_node if ranks_per_node else ep
    for rank in (rank["random"] for rank in everything):
        reached = [set((experts // (EXPERTS // places)).tolist()) for experts in rank["experts"]]
        assert rank["sent"] == [sum(place in several for several in reached) for place in range(places)]
        assert sum(rank["sent"]) < rank["experts"].numel()
