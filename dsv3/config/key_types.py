"""Say which keys hold texts, paths and whole numbers, by the types of the fields of every schema.

overrides.py reads a typed value by the type of its key: without this, Hydra's grammar would make a number of
the name `1e10`, and refuse the name `it's`.
"""

from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from enum import Flag, auto
from functools import cache
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

import dsv3.config.root  # noqa: F401  # registers every schema
from dsv3.config.registry import SCHEMAS

RESUME = "resume"
"""The one key of a path that is no field: cli/arguments.py puts the overrides of the run in its place."""


class KeyType(Flag):
    """The ways in which a typed value is read; a key of none of them is Hydra's to read."""

    text = auto()
    """str, or str | None."""
    texts = auto()
    """A list of str."""
    path = auto()
    """A text with the metadata of registry.PATH."""
    hub_name = auto()
    """A path that may also be a name, with the metadata of registry.PATH_OR_NAME."""
    integer = auto()
    """int, alone or in a list, and not float."""


def key_types(choices: Sequence[tuple[str, str]] = ()) -> dict[str, KeyType]:
    """Return the types of all keys of both programs by dotted key, without those that are Hydra's to read.

    Where the schemas of a group differ on a key, the one among `choices` (group, choice) counts; where none
    is, the key is left out.
    """
    found: dict[str, KeyType | None] = {RESUME: KeyType.text | KeyType.path}
    for name, schema in SCHEMAS.items():
        for key, kind in _schema_types(schema, _place(name, schema)):
            found[key] = kind if found.get(key, kind) == kind else None
    for group, choice in choices:
        if schema := SCHEMAS.get(f"{group}/{choice}"):
            found |= _schema_types(schema, _place(group, schema))
    return {key: kind for key, kind in found.items() if kind}


def _place(name: str, schema: Any) -> str:
    """Return the prefix of a schema's keys: its group, or nothing for a root."""
    return "" if name in ("config", "convert") else f"{name.partition('/')[0]}."


@cache  # every command asks three times, and reading type hints takes milliseconds
def _schema_types(schema: Any, prefix: str) -> tuple[tuple[str, KeyType], ...]:
    """Return the dotted keys below `schema` with their types, those of nested nodes included."""
    hints = get_type_hints(schema)
    found: list[tuple[str, KeyType]] = []
    for field in fields(schema):
        hint, key = hints[field.name], f"{prefix}{field.name}"
        nested: Any = next((kind for kind in (hint, *get_args(hint)) if is_dataclass(kind)), None)
        if nested is not None:
            found += _schema_types(nested, f"{key}.")
        elif not field.name.startswith("_"):
            kind = _type(hint, bool(field.metadata.get("path")))
            found.append((key, kind | KeyType.hub_name if field.metadata.get("name") else kind))
    return tuple(found)


def _type(hint: Any, path: bool) -> KeyType:
    kinds = {hint} if get_origin(hint) not in (Union, UnionType) else set(get_args(hint)) - {NoneType}
    items = {item for kind in kinds if get_origin(kind) in (list, tuple) for item in get_args(kind)} - {...}
    if kinds == {str}:
        return KeyType.text | KeyType.path if path else KeyType.text
    if items == {str}:
        return KeyType.texts
    return KeyType.integer if int in kinds | items and float not in kinds | items else KeyType(0)
