"""conf/layouts.yaml and docs/layouts.md against the search: their cheap rows."""

import pytest

from tests.docs.layouts_table import DOCUMENT, sections, table_row, title
from tests.docs.preset_layouts import compare

LEAST = 0.85
"""Share of the fastest layout's speed that a row reaches; conf/layouts.yaml says why not all of it."""


@pytest.mark.parametrize("preset", ["fsdp", "tp_ep"])
def test_a_preset_is_near_the_fastest_layout_of_its_kind(preset: str) -> None:
    row = compare("16b", preset)
    assert row.own is not None
    assert row.best is not None
    assert row.own.layout.degrees.world_size == row.world
    assert LEAST <= row.share <= 1 + 1e-9


def test_the_page_has_what_the_search_finds_now() -> None:
    row = table_row("16b", "h100", 8)
    assert row is not None
    assert row.to_markdown() in sections(DOCUMENT.read_text())[title("16b", "h100")].splitlines()
