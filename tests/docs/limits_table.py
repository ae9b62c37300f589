"""Write the limits into docs/reliability.md from the code: `python -m tests.docs.limits_table`."""

from pathlib import Path

from dsv3.config.limits import EXPERTS, ITEMS, LARGEST, REAL, WHOLE
from dsv3.config.registry import SCHEMAS
from dsv3.untrusted_files import LIMITS
from tests.config.test_limits import number_keys

DOCUMENT = Path(__file__).parents[2] / "docs" / "reliability.md"
BEGIN, END = "<!-- limits: made by tests/docs/limits_table.py -->", "<!-- end of limits -->"

FILES = {
    "yaml": "config.yaml, overrides.yaml, model.yaml, training.yaml, presets of a `--config-dir`",
    "json": "config.json, state.json, other settings, a line of a journal",
    "listing": "manifest.json, environment.json, index.json, headers of safetensors files",
    "tokenizer": "tokenizer.json, vocabularies, other JSON beside weights",
    "text": "other small texts",
    "rows": "metrics.jsonl and the journals of a run",
    "pickle": "`.metadata` of a DCP",
}


def files_table() -> str:
    """Return a row per kind of file."""
    rows = ["| files | bytes | values | nested |", "|---|---|---|---|"]
    for kind, limits in LIMITS.items():
        nodes, depth = (f"{limits.nodes:,}", f"{limits.depth}") if limits.nodes else ("", "")
        rows.append(f"| {FILES[kind]} | {limits.nbytes:,} | {nodes} | {depth} |")
    return "\n".join(rows)


def numbers_table() -> str:
    """Return a row per limit, with the keys that have it."""
    found: dict[int | float, dict[str, None]] = {}
    for name, schema in SCHEMAS.items():
        prefix = "" if name in ("config", "convert") else f"{name.partition('/')[0]}."
        for key in number_keys(schema):
            limit = key.limit
            if limit not in (WHOLE, REAL):
                found.setdefault(limit, {})[f"`{prefix}{'.'.join(key.path)}`"] = None
    rows = ["| at most | keys |", "|---|---|"]
    rows += [f"| {limit:,} | {', '.join(sorted(keys))} |" for limit, keys in sorted(found.items())]
    rows += [
        f"| {WHOLE:,} | every other whole number |",
        f"| {REAL:g} | every other number |",
    ]
    text = (
        f"A list has at most {ITEMS:,} values. All MoE layers of a model together have at most {EXPERTS:,} "
        f"experts. {LARGEST:,} is the largest number that a tensor counts with."
    )
    return "\n".join([*rows, "", text])


def document(text: str) -> str:
    """Return the document with its tables of limits made anew."""
    before, rest = text.split(BEGIN)
    tables = f"{files_table()}\n\nThe table lists the limits of numbers.\n\n{numbers_table()}"
    return f"{before}{BEGIN}\n\n{tables}\n\n{END}{rest.split(END)[1]}"


if __name__ == "__main__":
    DOCUMENT.write_text(document(DOCUMENT.read_text()))
