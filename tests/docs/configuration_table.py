"""The keys of docs/configuration.md, from the schemas: `python -m tests.docs.configuration_table`."""

import dataclasses
from enum import Enum
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from dsv3.config.root import SCHEMAS

DOCUMENT = Path(__file__).parents[2] / "docs" / "configuration.md"
BEGIN, END = "<!-- keys: made by tests/docs/configuration_table.py -->", "<!-- end of keys -->"


def table() -> str:
    """One section a schema: key, type and default of each field."""
    parts = []
    for name, schema in SCHEMAS.items():
        if name == "convert":
            continue
        if name == "config":
            sections = [("train", "train"), ("checkpoint", "checkpoint"), ("run", "run")]
            hints = get_type_hints(schema)
            parts += [_section(key, title, hints[key]) for key, title in sections]
        else:
            parts.append(_section(name.split("/")[0], name.replace("/", "="), schema))
    return "\n".join(parts)


def _section(prefix: str, title: str, schema: Any) -> str:
    rows = "\n".join(f"| `{key}` | {kind} | {default} |" for key, kind, default in _rows(prefix, schema))
    first = (schema.__doc__ or "").strip().splitlines()[0]
    return f"### {title}\n\n{first}\n\n| key | type | default |\n|---|---|---|\n{rows}\n"


def _rows(prefix: str, schema: Any) -> list[tuple[str, str, str]]:
    hints, rows = get_type_hints(schema), []
    for field in dataclasses.fields(schema):
        key, kind = f"{prefix}.{field.name}", hints[field.name]
        if field.name.startswith("_"):
            continue
        nested = next((one for one in get_args(kind) if dataclasses.is_dataclass(one)), None)
        if dataclasses.is_dataclass(kind):
            rows += _rows(key, kind)
        elif nested is not None:
            rows.append((key, "the keys below it, or null", "`null`" if field.default is None else "on"))
            rows += _rows(key, nested)
        else:
            rows.append((key, _kind(kind), _default(field)))
    return rows


def _kind(kind: Any) -> str:
    if isinstance(kind, type) and issubclass(kind, Enum):
        return " or ".join(f"`{member.name}`" for member in kind)
    if (
        get_origin(kind) is list
        and isinstance(get_args(kind)[0], type)
        and issubclass(get_args(kind)[0], Enum)
    ):
        return f"list of {_kind(get_args(kind)[0])}"
    text = kind.__name__ if isinstance(kind, type) and not hasattr(kind, "__args__") else str(kind)
    return text.replace("typing.", "").replace(" | None", ", null").replace("|", "or").rpartition("dsv3.")[2]


def _default(field: Any) -> str:
    value = field.default
    if value is dataclasses.MISSING:
        if field.default_factory is dataclasses.MISSING:
            return "required"
        value = field.default_factory()
    if isinstance(value, list) and value and isinstance(value[0], Enum):
        return f"`[{', '.join(member.name for member in value)}]`"
    if isinstance(value, Enum):
        value = value.name
    return "`null`" if value is None else f"`{value:.6g}`" if isinstance(value, float) else f"`{value}`"


def document(text: str) -> str:
    """The document with its table of keys made anew."""
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n\n{table()}\n{END}{rest.split(END)[1]}"


if __name__ == "__main__":
    DOCUMENT.write_text(document(DOCUMENT.read_text()))
