"""Translate the errors of Hydra and OmegaConf: key, value, what is allowed and the nearest choice."""

import re
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml
from hydra.errors import (
    ConfigCompositionException,
    HydraException,
    MissingConfigException,
    OverrideParseException,
)
from omegaconf.errors import InterpolationResolutionError, OmegaConfBaseException, ValidationError

from dsv3.cli.user_files import UserFiles, find_key, find_word, shown
from dsv3.config.key_types import KeyType, key_types
from dsv3.config.keys import schema_keys
from dsv3.config.overrides import split_commas, split_override
from dsv3.config.registry import CONF, SCHEMAS, config_groups, described_key
from dsv3.config.strict import plain_reason, unknown_key
from dsv3.errors import did_you_mean
from dsv3.untrusted_files import read_bytes, read_text

_EXTRAS = {
    "hydra/launcher": {"joblib": "sweep", "submitit_local": "slurm", "submitit_slurm": "slurm"},
    "hydra/sweeper": {"optuna": "sweep"},
}
"""Choices that a plugin of Hydra's adds, with the extra of setup.cfg that installs it."""


def root_groups(root: str, files: UserFiles) -> dict[str, list[str]]:
    """Return the choices of the config groups that conf/ROOT.yaml chooses from."""
    defaults = yaml.safe_load((CONF / f"{root}.yaml").read_text())["defaults"]
    named = {group for entry in defaults if isinstance(entry, dict) for group in entry}
    own = [folder for folder in files.folders if folder != CONF and folder.is_dir()]
    return {group: choices for group, choices in config_groups(*own).items() if group in named}


_PARSER = ("LexerNoViableAlt", "Error parsing", "mismatched input", "no viable", "extraneous", "missing")
"""Beginnings of what the parser says in terms of its grammar."""

_IN_FILE = re.compile(r"(?:In|Invalid defaults list in) '([^']+)'[:,] ")


def explain_error(
    error: Exception, arguments: Sequence[str], groups: dict[str, list[str]], files: UserFiles | None = None
) -> str:
    """Return the text to print instead of `error`, an exception of Hydra, OmegaConf, YAML or the file system.

    `groups` are the choices of the config groups of the program's root, `files` the user's own YAML files.
    """
    if isinstance(error, yaml.YAMLError | UnicodeDecodeError):
        return _bad_yaml(error, files)
    if isinstance(error, OverrideParseException):
        return _bad_grammar(error)
    if isinstance(error, MissingConfigException):
        return _missing_choice(error, arguments, groups, files)
    if isinstance(error, OSError):  # as the last one is, too
        name = str(error.filename or "a file")
        name = name if len(name) <= 300 else f"{name[:150]}...{name[-150:]}"
        return f"{name}: {error.strerror or error}"
    if isinstance(error, ConfigCompositionException) and (found := _IN_FILE.match(str(error))):
        return _bad_file(found[1], error, groups, files)
    cause = error.__cause__ if isinstance(error, HydraException) else error
    if isinstance(cause, OmegaConfBaseException):
        place = files.place(str(cause.full_key or "")) if files else ""
        return place + _bad_value(cause, arguments, groups)
    if "Ambiguous value" in str(error):
        found = re.search(r"argument '(.*)'", str(error))
        argument = found[1] if found else "it"
        return f"{argument} are several values: -m sweeps over them, [...] makes a list, quotes make a text"
    if found := re.search(r"does not support sweep type : (\w+)_SWEEP", str(error)):
        return f"{found[1].lower()}(...) is for a search: hydra/sweeper=optuna"
    if isinstance(error, ConfigCompositionException):
        return _bad_composition(error, arguments, groups, files)
    return _first_lines(str(error))


def _bad_grammar(error: OverrideParseException) -> str:
    reason = str(error).splitlines()[0]
    if "=" not in error.override:
        return f"cannot read {error.override!r}: an override is KEY=VALUE or GROUP=CHOICE"
    if reason.startswith(_PARSER):
        reason = "a quote or bracket is not closed, or a character needs quotes"
    hint = "Quote a value that holds , = [ ] { } ( ) or spaces: 'key=\"...\"'"
    return f"cannot read the override {error.override!r}: {reason}\n{hint}"


def _bad_yaml(error: yaml.YAMLError | UnicodeDecodeError, files: UserFiles | None) -> str:
    """Name file, line and problem of a file that cannot be read."""
    mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
    if mark is not None:
        problem = getattr(error, "problem", None) or getattr(error, "context", None) or "it cannot be read"
        return f"{shown(Path(mark.name))}:{mark.line + 1}: not YAML: {problem}"
    for file in files.used if files else []:  # these two errors do not say where they arose
        content = read_bytes(file, "yaml")
        try:
            yaml.compose(content.decode())
        except UnicodeDecodeError as problem:
            line = content[: problem.start].count(b"\n") + 1
            return f"{shown(file)}:{line}: not UTF-8: byte {content[problem.start]:#x}"
        except yaml.reader.ReaderError as problem:
            line = content.decode()[: problem.position].count("\n") + 1
            return f"{shown(file)}:{line}: not YAML: the character {chr(problem.character)!r}"
        except yaml.YAMLError:
            pass
    return _first_lines(f"a file of the configuration cannot be read: {error}")


def _bad_file(name: str, error: Exception, groups: dict[str, list[str]], files: UserFiles | None) -> str:
    """Explain an error in the file GROUP/CHOICE: its line, and what a command line would be told."""
    file, cause = files.find(name) if files else None, error.__context__
    if file is None:  # a schema of the user's, or a file of dsv3's that does not suit the choices
        place = f"{name}: " if name.partition("/")[0] in SCHEMAS or "/" in name else ""
        if isinstance(cause, OmegaConfBaseException):
            return place + _bad_value(cause, [], groups)
        return place + _first_lines(str(error))
    place, group = f"{shown(file)}: ", name.rpartition("/")[0]
    if found := re.search(r"Could not override '([^']+)'", str(error)):
        told = f"there is no config group '{found[1]}'.{did_you_mean(found[1], groups)}"
        return f"{shown(file)}:{find_word(file, found[1])}: {told} Groups: {', '.join(groups)}"
    if not isinstance(cause, OmegaConfBaseException):
        return place + _first_lines(_IN_FILE.sub("", str(error), count=1))
    if found := re.search(r"(?:Merge error|assigned): .* is not a subclass of .*value: (.*)", str(cause.msg)):
        return f"{shown(file)}:{find_word(file, found[1])}: {found[1]} stands where the keys of a node belong"
    key = str(cause.full_key or "")
    if key == group:
        return f"{place}its values are no node {group}: begin the file with the line `# @package _global_`"
    found_key = find_key(file, key)
    line = f"{shown(file)}:{found_key[0]}: " if found_key else place
    return line + _bad_value(cause, [], groups)


def _missing_choice(
    error: MissingConfigException,
    arguments: Sequence[str],
    groups: dict[str, list[str]],
    files: UserFiles | None,
) -> str:
    group, _, choice = str(error.missing_cfg_file).rpartition("/")
    inside = re.match(r"In '([^']+)'", str(error))
    file = files.find(inside[1]) if files and inside else None
    place = f"{shown(file)}:{find_word(file, choice)}: " if file else ""
    typed = {override.partition("=")[0].lstrip("+") for override in arguments}
    if files and not file and group not in typed:
        word = re.compile(rf"\b{re.escape(choice)}\b")
        named = (each for each in files.used if word.search(read_text(each, "yaml")))
        place = next((f"{shown(each)}:{find_word(each, choice)}: " for each in named), "")
    within, _, last = group.rpartition("/")
    if file and within and last in groups:
        return f"{place}in a defaults list write `- override /{last}: {choice}`"
    return place + _missing_in_group(group, choice, error, groups)


def _missing_in_group(
    group: str, choice: str, error: MissingConfigException, groups: dict[str, list[str]]
) -> str:
    choices = groups.get(group) or list(error.options or ())  # Hydra's own groups are not in conf/
    extras = _EXTRAS.get(group, {})
    if choice in extras:
        return f"{group}={choice} is not installed: pip install 'dsv3[{extras[choice]}]'"
    choices = sorted({*choices, *extras})
    if not choices:
        return f"there is no config group '{group}'.{did_you_mean(group, groups)} Groups: {', '.join(groups)}"
    return _no_choice(group, choice, choices)


def _no_choice(group: str, choice: str, choices: Sequence[str]) -> str:
    return f"{group}={choice} is not a choice.{did_you_mean(choice, choices)} Choices: {', '.join(choices)}"


def _bad_value(cause: OmegaConfBaseException, arguments: Sequence[str], groups: dict[str, list[str]]) -> str:
    key, raw = cause.full_key or "", str(cause.msg or cause).splitlines()[0]
    reason = plain_reason(raw, key)
    if isinstance(cause, InterpolationResolutionError):
        guilty = [argument for argument in arguments if "${" in argument]
        hint = "; \\${ is a text that is not to be filled in" if guilty else ""
        if found := re.search(r"Interpolation key '(.*)' not found", reason):
            keys = [known.name.lstrip(".") for known in schema_keys(SCHEMAS["config"], "")]
            hint = f": name another key by its whole path, as ${{train.seed}}{hint}."
            hint += did_you_mean(found[1], keys)
        return f"{' '.join(guilty) or key}: {reason}{hint}"
    typed = [pair[1] for pair in map(split_override, arguments) if pair and pair[0] == key]
    if typed and raw.startswith("Cannot merge DictConfig") and typed[-1].startswith("{"):
        reason = "must be a list, [A,B]"
    if typed and reason == "must be a list, [A,B]" and key_types().get(described_key(key)) is KeyType.texts:
        reason = f"give one, {key}=A, or a list, {key}=[A,B]"
    if typed and (reason != raw or isinstance(cause, ValidationError)):
        members = re.search(r"expected one of \[(.*)\]", reason)
        hint = did_you_mean(typed[-1], members[1].split(", ")) if members else ""
        return f"{key}={typed[-1]} is not possible: {reason}{hint}"
    if isinstance(cause, ValidationError):
        value = re.match(r"Value '(.*?)' of type '(\w+)' could not", raw)
        return f"{key}={value[1]} is not possible: {reason}" if value else f"{key}: {reason}"
    if "not in" in reason and key:
        return unknown_key(key, _known_keys(cause.parent_node) or list(groups))
    if "does not support deletion" in reason:
        return f"~{key}: a key cannot be removed; give it a value, {key}=..."
    return f"{key}: {reason}" if key else reason


def _no_group(argument: str, key: str, groups: dict[str, list[str]], files: UserFiles | None) -> str:
    """Return the message for a choice of something that the root has no group of."""
    group, _, package = key.partition("@")
    if package:
        plain = argument.replace(f"@{package}", "", 1)
        return f"{argument}: a group keeps its own node; without the @{package}: {plain}"
    if files and any((folder / group).is_dir() for folder in files.folders if folder != CONF):
        return f"{argument}: {group} is a group of your own, which a + adds: +{argument}"
    told = f"there is no config group '{group}'.{did_you_mean(group, groups)} Groups: {', '.join(groups)}"
    return f"{argument}: {told}"


def _bad_composition(
    error: Exception, arguments: Sequence[str], groups: dict[str, list[str]], files: UserFiles | None
) -> str:
    """Explain errors about a group's choice that do not say which argument is meant, or how to fix it."""
    for argument in arguments:
        if argument.startswith("="):
            return f"{argument!r}: the key before the = is missing"
        key, value = split_override(argument) or ("", "")
        if argument.startswith("~") and argument[1:].partition("=")[0] in groups:
            return f"{argument}: a group cannot be removed; choose, {argument[1:].partition('=')[0]}=CHOICE"
        if key in groups and key != "experiments" and value.startswith("["):
            first = split_commas(value.strip("[] "))[0]
            return f"{argument}: {key} has one choice and no list: {key}={first}"
        if key in groups and argument.startswith("+") and "Multiple values" in str(error):
            return f"{argument}: {key} is chosen already; without the +: {key}={value}"
        if key in groups and value not in groups[key] and "must be a string" in str(error):
            return _no_choice(key, value, groups[key])
        if argument.startswith("~") and f"'{key or argument[1:]}' does not exist" in str(error):
            return f"{argument}: there is no '{key or argument[1:]}' to remove"
        if key and f"Could not override '{key}'" in str(error):
            return _no_group(argument, key, groups, files)
    below, whole = "Unexpected type for root" in str(error), "'NoneType' object" in str(error)
    for argument in arguments:
        key, value = split_override(argument) or ("", "")
        if (below and key.count(".") > 1) or (whole and value.startswith("{")):
            return f"{argument}: {_null_node(key, groups)}"
    return _first_lines(f"{' '.join(arguments)} cannot be composed: {error}")


def _null_node(key: str, groups: dict[str, list[str]]) -> str:
    """Return the message for a key whose node is null in the chosen file of its group."""
    group, name = (*key.split("."), "")[:2]
    having = [f"{group}={choice}" for choice in groups.get(group, []) if _fills(group, choice, name)]
    return f"{group}.{name} is null here; {' or '.join(having) or 'another choice of its group'} has it"


def _fills(group: str, choice: str, name: str) -> bool:
    """Return True where a choice's file, or else the group's schema, gives a node its keys."""
    file = CONF / group / f"{choice}.yaml"
    stored = (yaml.safe_load(file.read_text()) or {}) if file.is_file() else {}
    known = {f.name: f.default is not None for f in fields(SCHEMAS[group])} if group in SCHEMAS else {}
    return stored[name] is not None if name in stored else known.get(name, False)


def _known_keys(parent: Any) -> list[str]:
    keys = parent.keys() if hasattr(parent, "keys") else []
    return [str(key) for key in keys if not str(key).startswith("_") and key != "hydra"]


def _first_lines(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return " ".join(lines)[:300]
