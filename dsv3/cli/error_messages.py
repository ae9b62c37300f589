"""Translate the errors of Hydra and OmegaConf: key, value, what is allowed and the nearest choice."""

import re
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import yaml
from hydra.errors import (
    ConfigCompositionException,
    HydraException,
    MissingConfigException,
    OverrideParseException,
)
from omegaconf.errors import InterpolationResolutionError, OmegaConfBaseException, ValidationError

from dsv3.config.overrides import split_override
from dsv3.config.registry import CONF, SCHEMAS
from dsv3.errors import did_you_mean

_EXTRAS = {
    "hydra/launcher": {"joblib": "sweep", "submitit_local": "slurm", "submitit_slurm": "slurm"},
    "hydra/sweeper": {"optuna": "sweep"},
}
"""Choices that a plugin of Hydra's adds, with the extra of setup.cfg that installs it."""


def explain_error(error: Exception, arguments: Sequence[str], groups: dict[str, list[str]]) -> str:
    """Return the text to print instead of `error`; `groups` are the config groups' choices."""
    if isinstance(error, OverrideParseException):
        return _bad_grammar(error)
    if isinstance(error, MissingConfigException):
        return _missing_choice(error, groups)
    cause = error.__cause__ if isinstance(error, HydraException) else error
    if isinstance(cause, OmegaConfBaseException):
        return _bad_value(cause, arguments, groups)
    if "Ambiguous value" in str(error):
        found = re.search(r"argument '(.*)'", str(error))
        argument = found[1] if found else "it"
        return f"{argument} are several values: -m sweeps over them, [...] makes a list, quotes make a text"
    if isinstance(error, ConfigCompositionException):
        return _bad_composition(error, arguments, groups)
    return _first_lines(str(error))


def _bad_grammar(error: OverrideParseException) -> str:
    reason = str(error).splitlines()[0]
    if "=" not in error.override:
        return f"cannot read {error.override!r}: an override is KEY=VALUE or GROUP=CHOICE"
    if reason.startswith(("LexerNoViableAlt", "Error parsing")):
        reason = "a quote or bracket is not closed, or a character needs quotes"
    hint = "Quote a value that holds , = [ ] { } ( ) or spaces: 'key=\"...\"'"
    return f"cannot read the override {error.override!r}: {reason}\n{hint}"


def _missing_choice(error: MissingConfigException, groups: dict[str, list[str]]) -> str:
    group, _, choice = str(error.missing_cfg_file).rpartition("/")
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
    key = cause.full_key or ""
    reason = str(cause.msg or cause).splitlines()[0]
    if isinstance(cause, InterpolationResolutionError):
        guilty = [argument for argument in arguments if "${" in argument]
        hint = "; \\${ is a text that is not to be filled in" if guilty else ""
        return f"{' '.join(guilty) or key}: {reason}{hint}"
    if isinstance(cause, ValidationError):
        typed = [pair[1] for pair in map(split_override, arguments) if pair and pair[0] == key]
        if not typed:
            return f"{key}: {reason}"
        members = re.search(r"expected one of \[(.*)\]", reason)
        hint = did_you_mean(typed[-1], members[1].split(", ")) if members else ""
        return f"{key}={typed[-1]} is not possible: {reason}{hint}"
    if "not in" in reason and key:
        last = key.rpartition(".")[2]
        known = list(groups) if cause.parent_node is None else _known_keys(cause.parent_node)
        return f"unknown key '{key}'.{did_you_mean(last, known)} Known here: {', '.join(known) or 'nothing'}"
    if "does not support deletion" in reason:
        return f"~{key}: a key cannot be removed; give it a value, {key}=..."
    return f"{key}: {reason}" if key else reason


def _bad_composition(error: Exception, arguments: Sequence[str], groups: dict[str, list[str]]) -> str:
    """Explain errors about a group's choice that do not say which argument is meant, or how to fix it."""
    for argument in arguments:
        if argument.startswith("="):
            return f"{argument!r}: the key before the = is missing"
        key, value = split_override(argument) or ("", "")
        if argument.startswith("~") and argument[1:].partition("=")[0] in groups:
            return f"{argument}: a group cannot be removed; choose, {argument[1:].partition('=')[0]}=CHOICE"
        if key in groups and argument.startswith("+"):
            return f"{argument}: {key} is chosen already; without the +: {key}={value}"
        if key in groups and value not in groups[key] and "must be a string" in str(error):
            return _no_choice(key, value, groups[key])
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
