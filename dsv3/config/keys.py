"""Describe the keys of a schema: type, default and the line of description under each field.

`python train.py task=NAME --help` and the tables of docs/configuration.md are made from this.
"""

import ast
import inspect
import textwrap
from collections.abc import Iterator
from dataclasses import MISSING, Field, fields, is_dataclass
from enum import Enum
from functools import cache
from itertools import pairwise
from typing import Any, NamedTuple, get_args, get_origin, get_type_hints


class Key(NamedTuple):
    """One config key as a reader sees it."""

    name: str
    """Dotted path from the root, such as `train.balance.bias_speed`."""
    kind: str
    """Type, or the choices of an enum."""
    default: str
    """Default in YAML, or `required`."""
    description: str
    """One line, with the unit."""


def summary(schema: type) -> str:
    """Return the first line of a schema's docstring."""
    return (inspect.getdoc(schema) or "").partition("\n")[0]


@cache
def descriptions(schema: type) -> dict[str, str]:
    """Return the docstring under each field of a dataclass, those of its bases included, by field name."""
    found: dict[str, str] = {}
    for base in reversed(schema.__mro__):
        if not is_dataclass(base):
            continue
        (definition,) = ast.parse(textwrap.dedent(inspect.getsource(base))).body
        assert isinstance(definition, ast.ClassDef)
        for statement, following in pairwise(definition.body):
            if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
                text = following.value if isinstance(following, ast.Expr) else None
                if isinstance(text, ast.Constant) and isinstance(text.value, str):
                    found[statement.target.id] = inspect.cleandoc(text.value)
    return found


def schema_keys(schema: type, prefix: str) -> Iterator[Key]:
    """Yield the keys of a schema below `prefix`, nested nodes in their place, without Hydra's own (`_x_`)."""
    hints, told = get_type_hints(schema), descriptions(schema)
    for field in fields(schema):
        if field.name.startswith("_"):
            continue
        name, hint = f"{prefix}.{field.name}", hints[field.name]
        nested = next((kind for kind in (hint, *get_args(hint)) if is_dataclass(kind)), None)
        if nested is not hint:
            kind = "the keys below it, or null" if nested else type_text(hint)
            default = "on" if nested and field.default is not None else _default(field)
            yield Key(name, kind, default, told.get(field.name, ""))
        if nested is not None:
            assert isinstance(nested, type)
            yield from schema_keys(nested, name)


def type_text(hint: Any) -> str:
    """Return a type as the documentation writes it: `int, null`, `fp32 or bf16`, `list[str]`."""
    if isinstance(hint, type) and issubclass(hint, Enum):
        return " or ".join(member.name for member in hint)
    arguments = get_args(hint)
    if get_origin(hint) is list and isinstance(arguments[0], type) and issubclass(arguments[0], Enum):
        return f"list of {type_text(arguments[0])}"
    if type(None) in arguments:
        kinds = [type_text(kind) for kind in arguments if kind is not type(None)]
        return f"{' or '.join(kinds)}, null"
    return hint.__name__ if isinstance(hint, type) and not arguments else str(hint).replace("typing.", "")


def value_text(value: Any) -> str:
    """Return a value as YAML writes it in one line, enums by name and floats with 6 digits."""
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(value_text, value))}]"
    if isinstance(value, Enum):
        return value.name
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, bool):
        return str(value).lower()
    return "null" if value is None else str(value)


def _default(field: Field[Any]) -> str:
    if field.default is MISSING and field.default_factory is MISSING:
        return "required"
    return value_text(field.default_factory() if field.default_factory is not MISSING else field.default)
