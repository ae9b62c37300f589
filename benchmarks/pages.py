"""Tables that benchmarks write into pages of docs/, between two comments."""

from collections.abc import Iterable
from pathlib import Path

DOCS = Path(__file__).resolve().parents[1] / "docs"


def fill(page: str, name: str, lines: Iterable[str]) -> None:
    """Put `lines` between `<!-- NAME: begin -->` and `<!-- NAME: end -->` of docs/`page`."""
    path = DOCS / page
    before, rest = path.read_text().split(begin := f"<!-- {name}: begin -->")
    after = rest.split(end := f"<!-- {name}: end -->")[1]
    path.write_text("\n".join([before + begin, *lines, end + after]))
