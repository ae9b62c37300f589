"""conf/layouts.yaml and docs/layouts.md against the search: their cheap rows."""

import pytest

from tests.docs.layouts_table import DOCUMENT, PRESETS, sections, table_row, title
from tests.docs.preset_layouts import compare, rows

CHEAP = [(model, preset) for model, preset in rows() if preset not in ("pp", "full") or model == "16b"]
"""Rows whose search takes less than a second."""


@pytest.mark.slow
@pytest.mark.parametrize(("model", "preset"), CHEAP)
def test_a_preset_is_the_fastest_of_its_kind_or_has_a_reason(model: str, preset: str) -> None:
    row = compare(model, preset)
    assert row.degrees.world_size == row.fastest.world_size == row.world
    assert row.share <= 1 + 1e-9
    assert row.has_reason
    assert row.to_markdown() in sections(DOCUMENT.read_text())[PRESETS].splitlines()


def test_the_page_has_every_preset() -> None:
    table = sections(DOCUMENT.read_text())[PRESETS]
    assert [tuple(line.split(" | ")[:2]) for line in table.splitlines() if line.startswith("| ")][1:] == [
        (f"| {model}", preset) for model, preset in rows()
    ]


def test_the_page_has_what_the_search_finds_now() -> None:
    row = table_row("16b", "h100", 8)
    assert row is not None
    assert row.to_markdown() in sections(DOCUMENT.read_text())[title("16b", "h100")].splitlines()
