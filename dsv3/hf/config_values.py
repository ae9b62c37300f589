"""Read a HuggingFace config.json key by key; every error is one line with the file and the key."""

import math
from pathlib import Path
from typing import Any

from dsv3.errors import UserError, quoted
from dsv3.untrusted_files import MissingFile, read_json, refuse_lfs_pointer


class HFValues:
    """A JSON object of `file`: all of it, or an object in it with the path `inside` (`rope_scaling.`)."""

    def __init__(self, file: Path, values: dict[str, Any], inside: str = "") -> None:
        self.file = file
        self.values = values
        self.inside = inside
        self.used: set[str] = set()
        """Keys that were asked for."""

    def error(self, key: str, value: Any, text: str) -> UserError:
        """Return the error that the `value` of `key` is wrong; `text` says why."""
        return UserError(f"{self.file}: {self.inside}{key}={quoted(value)} {text}")

    def missing(self, key: str, why: str) -> UserError:
        """Return the error that `key` is missing."""
        return UserError(f"{self.file} has no '{self.inside}{key}', {why}")

    def get(self, key: str, kind: type, default: Any = ..., nullable: bool = False) -> Any:
        """Return the value of `key`, which must be of `kind` (an int passes for a float).

        It may be null if `nullable`. Without a `default` the key must be there; a default of None lets it be
        null as well.
        """
        self.used.add(key)
        value = self.values.get(key, default)
        if value is ...:
            raise self.missing(key, f"which a {self.values.get('model_type', 'yarn')} model needs")
        if value is None and (nullable or default is None):
            return None
        right = isinstance(value, (int, float) if kind is float else kind) and (
            kind is bool or not isinstance(value, bool)
        )
        if not right:
            raise self.error(key, value, f"must be of type {kind.__name__}")
        if kind is not float:
            return value
        try:
            number = float(value)
        except OverflowError:
            number = math.inf
        if not math.isfinite(number):
            raise self.error(key, value, "must be a finite number")
        return number

    def require(self, key: str, allowed: tuple[Any, ...], default: Any) -> Any:
        """Return the value of `key`; UserError unless it is one of `allowed`."""
        self.used.add(key)
        value = self.values.get(key, default)
        if value not in allowed:
            choices = ", ".join(str(choice) for choice in allowed if choice is not None)
            raise self.error(key, value, f"is not supported; supported: {choices}")
        return value

    def node(self, key: str) -> "HFValues | None":
        """Return the object below `key`, or None."""
        self.used.add(key)
        value = self.values.get(key)
        if value is None:
            return None
        if not isinstance(value, dict):
            raise self.error(key, value, "must be an object")
        return HFValues(self.file, value, f"{self.inside}{key}.")


def read_config(directory: Path) -> HFValues:
    """Return the config.json of a directory; UserError where it is missing or not a JSON object."""
    file = directory / "config.json"
    try:
        refuse_lfs_pointer(file)
        values = read_json(file)
    except MissingFile:
        raise UserError(
            f"model.path={directory} holds no config.json: give a HuggingFace checkpoint"
        ) from None
    if not isinstance(values, dict):
        raise UserError(f"{file} is no JSON object")
    return HFValues(file, values)
