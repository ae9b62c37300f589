"""Check what Hydra composed against the schemas, and build objects from checked nodes."""

import importlib
import inspect
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import Field, fields, is_dataclass, replace
from typing import Any

from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue

from dsv3.config.checkpoint import absolute_path
from dsv3.config.limits import require_within
from dsv3.config.registry import NAMED_NODES, choices_with_key
from dsv3.errors import InvalidValue, UserError, did_you_mean

TRUSTED = ("dsv3", "torch.optim")

REPLACED = {
    "train.evaluate_batches": "train.evaluate_tokens counts the tokens of an evaluation over all ranks"
}
"""What takes the place of a key of older code whose values mean something else (upgrade.py has others)."""


def check_target(target: str, key: str, allow: Sequence[str] = (), settings: Sequence[str] = ()) -> type:
    """Return the class `target`; UserError unless a trusted module defines it and it takes all `settings`.

    The check has two steps, because a dotted path may leave its package through an import
    (`dsv3.x.os.system`): the path must be module.Class with the module inside a trusted package, and the
    class must have been defined in a trusted package.
    """
    trusted = (*TRUSTED, *allow)
    module, _, name = target.rpartition(".")
    if not _inside(module, trusted) or not name.isidentifier():
        raise UserError(
            f"{key}={target} is refused: only classes of {', '.join(trusted)} are built; "
            "to allow another module, type run.allow_targets=[module] on the command line"
        )
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError):
        raise UserError(f"{key}={target} does not exist: name a class as package.module.Class") from None
    if not isinstance(found, type) or not _inside(found.__module__, trusted):
        raise UserError(f"{key}={target} is refused: it is not a class that {', '.join(trusted)} defines")
    refused = [name for name in settings if not _takes(found, name)]
    if refused:
        raise UserError(f"{key}={target} is not possible: it takes no {', '.join(refused)}")
    return found


def _takes(kind: type, name: str) -> bool:
    """Return True where the constructor of `kind` takes an argument `name`."""
    try:
        taken = inspect.signature(kind).parameters
    except ValueError:  # a class written in C may not say
        return True
    return name in taken or any(parameter.kind is parameter.VAR_KEYWORD for parameter in taken.values())


def _inside(module: str, packages: Sequence[str]) -> bool:
    """Return True where `module` is one of `packages` or lies in one."""
    return any(module == package or module.startswith(package + ".") for package in packages)


def strict(node: DictConfig, allow_targets: Sequence[str] = ()) -> Any:
    """Return the dataclasses of a composed `node`; UserError for anything that the schema does not know.

    Hydra's own check lets `+key=` and `++key=` pass; this one does not.
    """
    for path, choices in _unknown_keys(node, ""):
        raise UserError(unknown_key(path, choices))
    schema: Any = OmegaConf.get_type(node)
    for key in (f.name for f in fields(schema) if f.name not in node):
        raise UserError(f"{key} is missing: a key cannot be removed (~{key})")
    try:
        typed = OmegaConf.to_object(node)
    except MissingMandatoryValue as error:
        raise UserError(f"{error.full_key} is missing: give it a value ({error.full_key}=...)") from None
    validate(typed, allow_targets)
    return typed


def unknown_key(key: str, known: Sequence[str]) -> str:
    """Return the message for a dotted key that is not among the `known` ones of its node."""
    node, _, last = key.rpartition(".")
    if key in REPLACED:
        return f"unknown key '{key}': {REPLACED[key]}"
    if having := choices_with_key(key):
        more = f" and {len(having) - 3} more choices have" if len(having) > 3 else " has"
        return f"unknown key '{key}' here: {' or '.join(having[:3])}{more} it"
    close = did_you_mean(last, known, f"{node}." if node else "")
    return f"unknown key '{key}'.{close} Known here: {', '.join(known) or 'nothing'}"


def validate(node: Any, allow_targets: Sequence[str] = (), path: str = "") -> None:
    """Let every dataclass below `node` check itself, and check that every `_target_` may be built."""
    for f in fields(node):
        value = getattr(node, f.name)
        if is_dataclass(value):
            validate(value, allow_targets, f"{path}{f.name}.")
        elif f.name == "_target_" and (value != f.default or not _inside(type(node).__module__, TRUSTED)):
            settings = [f.name for f in fields(node) if not f.name.startswith("_") and is_argument(f)]
            check_target(value, f"{path}_target_", allow_targets, settings)
        elif f"{path}{f.name}" in NAMED_NODES:
            pass  # read_choices, below
        elif isinstance(value, dict):
            for name, nested in value.items():
                if is_argument(f):
                    _check_free_node(nested, f"{path}{f.name}.{name}", allow_targets)
                else:
                    _require_number(node, f, f"{path}{f.name}.{name}", nested)
        else:
            _require_number(node, f, f"{path}{f.name}", value)
    if hasattr(node, "validate"):
        try:
            node.validate()
        except InvalidValue as error:
            raise InvalidValue(f"{path}{error.key}", error.value, error.allowed) from None
    if hasattr(node, "read_choices"):
        for name, nested in node.read_choices().items():
            validate(nested, allow_targets, f"{path}{name}.")


def _check_free_node(node: Any, path: str, allow_targets: Sequence[str]) -> None:
    """Raise UserError unless a node without a schema names a class that may be built and takes its keys."""
    if not isinstance(node, dict) or not isinstance(node.get("_target_"), str):
        raise UserError(f"{path} has no _target_: name its class, +{path}._target_=package.module.Class")
    hidden = [key for key in node if not isinstance(key, str) or (key.startswith("_") and key != "_target_")]
    values = [item for value in node.values() for item in (value if isinstance(value, list) else [value])]
    if hidden or any(isinstance(value, dict | list) for value in values):
        raise UserError(
            f"{path} takes values and lists of values beside _target_, "
            "no nodes, no numbers as names and no _keys_"
        )
    settings = [key for key in node if key != "_target_"]
    found = check_target(node["_target_"], f"{path}._target_", allow_targets, settings)
    for name, parameter in inspect.signature(found).parameters.items():
        needed = parameter.default is parameter.empty and parameter.kind is parameter.POSITIONAL_OR_KEYWORD
        if needed and name not in node:
            raise UserError(f"{path}.{name} is missing: {node['_target_']} needs it, +{path}.{name}=VALUE")


def _require_number(node: Any, field: Field[Any], key: str, value: Any) -> None:
    """Raise InvalidValue for nan and inf, which pass or fail every comparison, and beyond the limits."""
    numbers = value if isinstance(value, list | tuple) else [value]
    if any(isinstance(number, float) and not math.isfinite(number) for number in numbers):
        if field.metadata.get("unbounded"):
            return
        raise InvalidValue(key, value, "must be a finite number")
    require_within(type(node), field.name, key, value)


def build(node: Any, **runtime: Any) -> Any:
    """Instantiate the `_target_` of a checked config node, with `runtime` arguments beside its fields.

    Fields with the metadata `argument: False` are no arguments: the caller reads them.
    """
    if is_dataclass(node) and not all(map(is_argument, fields(node))):
        node = {f.name: getattr(node, f.name) for f in fields(node) if is_argument(f)}
    try:
        # instantiate() unescapes strings twice: once when it resolves the node, once when it reads it.
        return instantiate(escape_interpolation(escape_interpolation(node)), **runtime)
    except InstantiationException as error:
        raise error.__cause__ or error from None  # the constructor's own error, such as a UserError


def is_argument(field: Field[Any]) -> bool:
    """Return True where a field of a schema is an argument of the constructor that the schema names."""
    return bool(field.metadata.get("argument", True))


def to_yaml(node: Any) -> dict[str, Any]:
    """Return a config dataclass as plain YAML values, enums by name."""
    container = OmegaConf.to_container(OmegaConf.structured(node), enum_to_str=True)
    assert isinstance(container, dict)
    return {str(key): value for key, value in container.items()}


def to_absolute_yaml(node: Any) -> dict[str, Any]:
    """Return the same with absolute paths, as a run stores its config: it may be read from elsewhere."""
    values = to_yaml(node)
    for f in fields(node):
        value = getattr(node, f.name)
        if is_dataclass(value):
            values[f.name] = to_absolute_yaml(value)
        elif f.metadata.get("path") and value:
            values[f.name] = absolute_path(value, bool(f.metadata.get("name")))
    for name, nested in node.read_choices().items() if hasattr(node, "read_choices") else ():
        # Of a node that is kept as it was typed the paths alone are changed.
        key, _, own = name.partition(".")
        typed, absolute = values[key][own], to_absolute_yaml(nested)
        values[key][own] = typed | {
            f.name: absolute[f.name] for f in fields(nested) if f.metadata.get("path") and f.name in typed
        }
    return values


def plain_reason(reason: str, key: str) -> str:
    """Return OmegaConf's reason for refusing a value of `key` without its classes, where users meet it."""
    if kind := re.search(r"could not be converted to (Integer|Float)", reason):
        return f"must be a {'whole ' * (kind[1] == 'Integer')}number"
    if reason.endswith("is not Optional"):
        return "must have a value"
    if re.match(r"Cannot assign \w+ to Dict\[|Cannot merge DictConfig with ListConfig", reason):
        return f"has a value per name: {key}={{NAME:VALUE}}"
    if re.match(r"Key .* \(\w+\) is incompatible with|Incompatible key type", reason):
        return "the names of a node are texts: begin each with a letter, NODE={NAME:VALUE}"
    if "is not a subclass of" in reason:
        return f"is a node of keys: {key}.KEY=VALUE"
    if "is not a valid bool" in reason:
        return "must be true or false"
    if "is not a valid input for <enum" in reason:
        return "must be one value"
    return "must be a list, [A,B]" if "is not a ListConfig" in reason else reason


def _unknown_keys(node: DictConfig, path: str) -> Iterator[tuple[str, list[str]]]:
    """Yield the dotted paths of keys that no schema has, each with the keys that are known there."""
    schema = OmegaConf.get_type(node)
    known = [f.name for f in fields(schema)] if schema and is_dataclass(schema) else None
    key: Any  # a node without a schema may have numbers as keys
    for key in node:
        if known is not None and key not in known:
            yield f"{path}{key}", [name for name in known if not name.startswith("_")]
        elif not OmegaConf.is_missing(node, key) and isinstance(node[key], DictConfig):
            yield from _unknown_keys(node[key], f"{path}{key}.")


def escape_interpolation(value: Any) -> Any:
    """Return a value whose strings OmegaConf reads as they are, although they hold `${...}`."""
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{f.name: escape_interpolation(getattr(value, f.name)) for f in fields(value)})
    if isinstance(value, dict):
        return {key: escape_interpolation(item) for key, item in value.items()}
    if isinstance(value, list):
        return [escape_interpolation(item) for item in value]
    if isinstance(value, str):
        # A run of backslashes before ${ is halved by OmegaConf, so it is doubled here.
        return re.sub(r"(\\*)\$\{", lambda found: str(found[1]) * 2 + r"\${", value)
    return value
