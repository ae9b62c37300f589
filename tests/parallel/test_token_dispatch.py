"""Rows to several places and back: against loops, for routes of every shape."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3.parallel.token_dispatch import bring_back, make_route, send


@st.composite
def tables(draw: st.DrawFn) -> torch.Tensor:
    """Which of up to 7 rows go to which of up to 5 places; empty rows, empty places and no rows too."""
    rows, places = draw(st.integers(0, 7)), draw(st.integers(1, 5))
    flags = draw(st.lists(st.booleans(), min_size=rows * places, max_size=rows * places))
    return torch.tensor(flags, dtype=torch.bool).view(rows, places)


@settings(deadline=None, max_examples=200)
@given(tables())
def test_a_route_is_what_a_loop_over_places_finds(goes: torch.Tensor) -> None:
    pairs = [
        (place, row) for place in range(goes.shape[1]) for row in range(goes.shape[0]) if goes[row, place]
    ]
    route = make_route(goes, max(1, int(goes.sum(1).max()) if len(goes) else 1))
    assert list(zip(route.place.tolist(), route.source.tolist(), strict=True)) == pairs
    assert route.counts.tolist() == goes.sum(0).tolist()
    for row, slots in enumerate(route.slots.tolist()):
        assert [slot for slot in slots if slot < len(pairs)] == [
            number for number, (_, source) in enumerate(pairs) if source == row
        ]


@settings(deadline=None, max_examples=100)
@given(tables())
def test_both_directions_and_their_gradients_are_sums_of_copies(goes: torch.Tensor) -> None:
    most = max(1, int(goes.sum(1).max()) if len(goes) else 1)
    route = make_route(goes, most)
    # Whole numbers: sums are exact in any order.
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(-9, 9, (len(goes), 3), generator=generator).double().requires_grad_()
    copies = torch.randint(-9, 9, (len(route.source), 3), generator=generator).double().requires_grad_()
    sent, back = send(x, route), bring_back(copies, route)
    assert torch.equal(sent, x[route.source])
    assert torch.equal(back, torch.zeros_like(x).index_add(0, route.source, copies))
    (from_sent,) = torch.autograd.grad(sent, x, copies.detach())
    (from_back,) = torch.autograd.grad(back, copies, x.detach())
    assert torch.equal(from_sent, back.detach())
    assert torch.equal(from_back, sent.detach())
