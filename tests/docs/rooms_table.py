"""Write the table of rooms into docs/architecture.md: `python -m tests.docs.rooms_table`.

The order is that of import-linter's contract in pyproject.toml, which `make lint` holds.
"""

import importlib
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCUMENT = ROOT / "docs" / "architecture.md"
BEGIN, END = "<!-- rooms: made by tests/docs/rooms_table.py -->", "<!-- end of rooms -->"


def layers() -> list[str]:
    """Return the rooms and modules directly below dsv3, the highest first."""
    tools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]
    return list(tools["importlinter"]["contracts"][0]["layers"])


def table() -> str:
    """Return one row per room, the highest first: its name and the first sentence of its docstring."""
    lines = ["| room | what is in it |", "|---|---|"]
    for name in layers():
        sentence = (importlib.import_module(f"dsv3.{name}").__doc__ or "").strip().partition("\n\n")[0]
        path = f"dsv3/{name}" if (ROOT / "dsv3" / name).is_dir() else f"dsv3/{name}.py"
        lines.append(f"| `{path}` | {' '.join(sentence.split())} |")
    return "\n".join(lines)


def document(text: str) -> str:
    """Return the document with its table of rooms made anew."""
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n\n{table()}\n\n{END}{rest.split(END)[1]}"


if __name__ == "__main__":
    DOCUMENT.write_text(document(DOCUMENT.read_text()))
