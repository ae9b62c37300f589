"""Write tables of benchmarks into pages of docs/, between two comments.

A page gets at most one row per group of results; the JSON of the benchmark has every result.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

DOCS = Path(__file__).resolve().parents[1] / "docs"


def fill(page: str, name: str, lines: Iterable[str]) -> None:
    """Put `lines` between `<!-- NAME: begin -->` and `<!-- NAME: end -->` of docs/`page`."""
    path = DOCS / page
    before, rest = path.read_text().split(begin := f"<!-- {name}: begin -->")
    after = rest.split(end := f"<!-- {name}: end -->")[1]
    path.write_text("\n".join([before + begin, *lines, end + after]))


def largest(
    rows: Mapping[str, Mapping[str, Any]], groups: Mapping[str, str], keys: Sequence[str]
) -> list[str]:
    """Return one row of a table per group: its name, size, ranks and the largest value of each key.

    `rows` has the results by name, `groups` the group of each name. A result with an "error" has its own row.
    """
    lines = []
    for group in dict.fromkeys(groups.values()):
        own = [rows[name] for name in rows if groups.get(name) == group and "error" not in rows[name]]
        if own:
            ranks = sorted({row["ranks"] for row in own})
            values = " | ".join(f"{max(row[key] for row in own):.1e}" for key in keys)
            lines.append(f"| {group} | {len(own)} | {', '.join(map(str, ranks))} | {values} |")
    failed = {name: row for name, row in rows.items() if "error" in row}
    return lines + [
        f"| {name} | 1 | {row['ranks']} | failed: {row['error']} |{' |' * (len(keys) - 1)}"
        for name, row in failed.items()
    ]
