"""Write the keys of docs/configuration.md from the schemas: `python -m tests.docs.configuration_table`."""

from pathlib import Path
from typing import Any, get_type_hints

import dsv3.config.root  # noqa: F401 - registers every schema
from dsv3.config.convergence import kind
from dsv3.config.keys import Key, schema_keys, summary
from dsv3.config.registry import SCHEMAS
from tests.config.key_effects import effect

DOCUMENT = Path(__file__).parents[2] / "docs" / "configuration.md"
BEGIN, END = "<!-- keys: made by tests/docs/configuration_table.py -->", "<!-- end of keys -->"


def table() -> str:
    """Return one section per schema: key, type, default and description of each field."""
    hints = get_type_hints(SCHEMAS["config"])
    sections = [_section(node, node, hints[node]) for node in ("train", "checkpoint", "run")]
    for name, schema in sorted(SCHEMAS.items()):  # schemas register in the order of imports
        if name not in ("config", "convert"):
            sections.append(_section(name.split("/")[0], name.replace("/", "="), schema))
    return "\n".join(sections)


def _section(prefix: str, title: str, schema: Any) -> str:
    # The keys of model=hf are typed as those of any model.
    keys = [key for key in schema_keys(schema, prefix) if title != "model=hf" or key.name == "model.path"]
    text = f"### {title}\n\n{summary(schema)}{' It has the keys of `model`, and:' * (title == 'model=hf')}\n"
    if not keys:
        return f"{text}\nNo keys.\n"
    rows = "\n".join(_row(title, key) for key in keys)
    titles = ("key", "type", "default", "changes", "shows in", "description")
    return f"{text}\n| {' | '.join(titles)} |\n{'|---' * len(titles)}|\n{rows}\n"


def _row(title: str, key: Key) -> str:
    """Return the row of a key: `changes` is its kind of difference between two runs."""
    found = effect(title.replace("=", "/"), key.name)
    shows = found.shows if found else ""
    cells = (f"`{key.name}`", key.kind, f"`{key.default}`", kind(key.name).name, shows, key.description)
    return f"| {' | '.join(cells)} |"


def document(text: str) -> str:
    """Return the document with its table of keys made anew."""
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n\n{table()}\n{END}{rest.split(END)[1]}"


if __name__ == "__main__":
    DOCUMENT.write_text(document(DOCUMENT.read_text()))
