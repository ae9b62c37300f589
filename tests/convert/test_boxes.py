"""Intersections of boxes against sets of indices."""

from itertools import product

from hypothesis import given
from hypothesis import strategies as st

from dsv3.convert.dcp_source import intersect, relative_index

Sides = list[tuple[int, int]]
SIDES = st.tuples(st.integers(0, 4), st.integers(0, 3))


def indices(sides: Sides) -> set[tuple[int, ...]]:
    return set(product(*(range(first, first + size) for first, size in sides)))


@given(
    st.integers(0, 3).flatmap(lambda dims: st.tuples(*[st.lists(SIDES, min_size=dims, max_size=dims)] * 2))
)
def test_boxes_meet_where_they_have_indices_in_common(pair: tuple[Sides, Sides]) -> None:
    one, other = pair
    common = indices(one) & indices(other)
    boxes = [[side[part] for side in sides] for sides in (one, other) for part in (0, 1)]
    found = intersect(*boxes)
    if found is None:
        assert not common
        return
    low, high = found
    assert indices([(a, b - a) for a, b in zip(low, high, strict=True)]) == common != set()
    counted = [
        (box.start + first, box.stop - box.start)
        for box, first in zip(relative_index(low, high, boxes[0]), boxes[0], strict=True)
    ]
    assert indices(counted) == common
