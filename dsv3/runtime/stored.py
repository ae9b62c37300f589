"""What a run has stored of its config, read as data."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from dsv3.runtime.errors import UserError
from dsv3.runtime.targets import check_target


def stored_leaves(file: Path) -> dict[str, Any]:
    """The values of a stored YAML file by their dotted keys; UserError where it holds no config."""
    try:
        node = yaml.safe_load(file.read_text())
        if not isinstance(node, dict):
            raise TypeError
        return flat(node)
    except (OSError, ValueError, yaml.YAMLError, TypeError, RecursionError):
        raise UserError(f"{file} holds no config; is it a run's?") from None


def flat(node: Any, path: str = "") -> dict[str, Any]:
    """The leaves of nested dicts, and of dicts in lists, by their dotted keys."""
    leaves: dict[str, Any] = {}
    for key, value in node.items() if isinstance(node, dict) else enumerate(node):
        nested = isinstance(value, list) and any(isinstance(item, dict | list) for item in value)
        inner = nested or isinstance(value, dict)
        leaves |= flat(value, f"{path}{key}.") if inner else {f"{path}{key}": value}
    return leaves


def check_stored_targets(
    file: Path, stored: Mapping[str, Any], checked: Mapping[str, Any], allow: Sequence[str]
) -> None:
    """UserError for a `_target_` in `file` that may not be built, but for those `checked` already.

    Nothing is built of what is stored; but whoever planted it there may have planted more.
    """
    for key, target in stored.items():
        if key.rpartition(".")[2] == "_target_" and target != checked.get(key):
            check_target(str(target), f"{file}: {key}", allow)
