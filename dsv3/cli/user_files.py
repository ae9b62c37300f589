"""Find where the YAML files of a command set a key, for messages: presets and studies of the user's own.

The files are those of --config-dir and of experiments/. Hydra reads them and forgets their lines.
"""

import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf

from dsv3.config.key_types import KeyType, key_types
from dsv3.config.overrides import split_commas, split_override
from dsv3.config.registry import CONF, config_groups
from dsv3.errors import UserError
from dsv3.untrusted_files import BadFile, compose_yaml, read_text, require_bounded_yaml

_PACKAGE = re.compile(r"^#\s*@package\s+(\S+)", re.MULTILINE)


class UserFiles:
    """The YAML files that a command reads beside dsv3's own."""

    def __init__(self, arguments: Sequence[str], own: Path | None) -> None:
        self.folders = [*([own] if own else []), CONF]
        """Folders of config groups; the first one wins."""
        self.typed = [pair for pair in map(split_override, arguments) if pair]
        self.used = list(self._used())

    def find(self, name: str) -> Path | None:
        """Return the user's file of GROUP/CHOICE; None for dsv3's own choices and for those of no file."""
        for folder in self.folders:
            file = folder / f"{name}.yaml"
            if os.path.isfile(file):  # noqa: PTH113  # Path's raises for a name that is too long
                return file if folder is not CONF or name.startswith("experiments/") else None
        return None

    def place(self, key: str) -> str:
        """Return `FILE:LINE: ` of the file that sets a key, or nothing where it is typed or no file does."""
        if any(key == typed for typed, _ in self.typed):
            return ""
        for file in reversed(self.used):
            if found := find_key(file, key):
                return f"{shown(file)}:{found[0]}: "
        return ""

    def check(self) -> None:
        """Raise UserError for what Hydra would tell without a fix: a choice's suffix, a file without keys."""
        groups = config_groups(*(folder for folder in self.folders if folder.is_dir()))
        for key, value in self.typed:
            for choice in split_commas(value.strip("[]")) if key in groups else []:
                name = choice.strip().removesuffix(".yaml").removesuffix(".yml")
                if name != choice.strip():
                    raise UserError(f"{key}={value}: a choice is named without its suffix: {key}={name}")
        for file in self.used:
            require_bounded_yaml(shown(file))
            _require_keys(file)
        self.check_texts()

    def check_texts(self) -> None:
        """Raise UserError for a text that YAML reads as a number or a truth value and does not give back."""
        types = key_types(self.typed)
        for file in self.used:
            for key, value in _leaves(_content(file), _package(file)):
                kind = types.get(key, KeyType(0))
                items = value if kind is KeyType.texts and isinstance(value, list) else [value]
                lost = [item for item in items if isinstance(item, bool | int | float)]
                if kind & (KeyType.text | KeyType.texts) and lost:
                    line, node = find_key(file, key) or (1, None)
                    source = _source(node, lost[0])
                    raise UserError(
                        f"{shown(file)}:{line}: {key} is a text, and YAML reads {source} as {lost[0]}: "
                        f'write it in quotes, "{source}"'
                    )

    def _used(self) -> Iterator[Path]:
        """Yield the files of the choices that are typed, and of those that their defaults lists name."""
        waiting = [
            f"{key.partition('@')[0]}/{choice.strip().strip(chr(39))}"
            for key, value in self.typed
            for choice in split_commas(value.strip("[]"))
        ]
        seen = set()
        while waiting:
            name = waiting.pop(0)
            file = self.find(name)
            if file is not None and name not in seen:
                seen.add(name)
                yield file
                waiting += _included(_content(file), name.rpartition("/")[0])


def find_key(file: Path, key: str) -> tuple[int, yaml.Node] | None:
    """Return the line of a dotted key in `file`, and the YAML node of its value; None where it has none."""
    node: Any
    try:
        package, node = _package(file), compose_yaml(file)
    except BadFile:
        return None
    if package and not key.startswith(f"{package}."):
        return None
    line = 1
    for part in key.removeprefix(f"{package}.").partition("[")[0].split("."):
        pairs = node.value if isinstance(node, yaml.MappingNode) else []
        found = next((pair for pair in pairs if pair[0].value == part), None)
        if found is None:
            return None
        line, node = found[0].start_mark.line + 1, found[1]
    return line, node


def find_word(file: Path, word: str) -> int:
    """Return the number of the first line of `file` that holds `word`, or 1."""
    lines = read_text(file, "yaml", errors="replace").splitlines()
    whole = re.compile(rf"(?<!\w){re.escape(word)}(?!\w)")
    return next((number for number, line in enumerate(lines, 1) if whole.search(line)), 1)


def shown(file: Path) -> str:
    """Return a file's path as a message gives it: from the current directory where it lies below it."""
    path = os.path.realpath(file) if file.is_relative_to(CONF) else str(file)
    below = os.path.relpath(path)
    return path if below.startswith("..") else below


def _require_keys(file: Path) -> None:
    """Raise UserError for a file that holds a list, a value or nothing where keys belong."""
    try:
        root = compose_yaml(file)
    except BadFile:
        return  # Hydra cannot read it either
    experiment = file.parent.name == "experiments"
    if isinstance(root, yaml.MappingNode) or (root is None and not (experiment and _package(file))):
        return
    found = {yaml.SequenceNode: "a list", yaml.ScalarNode: "a value"}.get(type(root), "nothing")
    header = "the line `# @package _global_`, and then " if experiment else ""
    line = root.start_mark.line + 1 if root is not None else 1
    raise UserError(f"{shown(file)}:{line}: {found} stands where keys belong: write {header}KEY: VALUE")


def _package(file: Path) -> str:
    """Return the dotted node that the keys of a file belong to; nothing for the root."""
    group = ".".join(file.parent.parts[-1:])
    found = _PACKAGE.search(read_text(file, "yaml", errors="replace"))
    package = found[1] if found else "_group_"
    return {"_global_": "", "_group_": group}.get(package, package)


def _content(file: Path) -> Any:
    """Return a file's values as Hydra reads them; nothing where it cannot, of which Hydra will tell."""
    try:
        require_bounded_yaml(file)
        return OmegaConf.to_container(OmegaConf.load(file))
    except Exception:
        return None


def _included(content: Any, group: str) -> Iterator[str]:
    """Yield GROUP/CHOICE for every file that a defaults list names; the list's own file is in `group`."""
    listed = content.get("defaults") if isinstance(content, dict) else None
    for entry in listed if isinstance(listed, list) else []:
        for key, choice in entry.items() if isinstance(entry, dict) else [("", entry)]:
            name = str(key).split(" ")[-1].partition("@")[0]
            whole = name.startswith("/") or str(key).startswith("override ")
            parent = name.strip("/") if whole else "/".join(filter(None, (group, name)))
            for one in choice if isinstance(choice, list) else [choice]:
                yield str(one).lstrip("/") if not key and str(one).startswith("/") else f"{parent}/{one}"


def _leaves(node: Any, path: str) -> Iterator[tuple[str, Any]]:
    """Yield the dotted keys of nested dicts with their values."""
    for key, value in node.items() if isinstance(node, dict) else ():
        name = f"{path}.{key}" if path else str(key)
        if isinstance(value, dict):
            yield from _leaves(value, name)
        else:
            yield name, value


def _source(node: yaml.Node | None, value: Any) -> str:
    """Return how the file writes `value`, which is that of `node` or an item of its list."""
    items = node.value if isinstance(node, yaml.SequenceNode) else [node]
    written = [item.value for item in items if isinstance(item, yaml.ScalarNode)]
    return next((text for text in written if OmegaConf.create(f"x: {text}").x == value), str(value))
