"""Read what is typed of a whole node as its user means it, before Hydra applies it to the default choice.

`GROUP._target_=X` is the choice of the group whose schema has that `_target_`: the keys of the default choice
would not fit it. `KEY={..}` of a dict adds its entries, for which Hydra would want a `+`, and so do the keys
of a named node, such as `data.sources.NAME.path=X`.
"""

from collections.abc import Iterator, Sequence
from dataclasses import fields, is_dataclass
from typing import Any, get_args, get_origin, get_type_hints

from dsv3.config.optimizer import refuse_without_schema
from dsv3.config.overrides import is_multirun, override_key, split_commas, split_override
from dsv3.config.registry import NAMED_NODES, SCHEMAS, config_groups
from dsv3.errors import UserError

_SUFFIX = "._target_"


def choose_by_target(argv: Sequence[str]) -> list[str]:
    """Return the arguments with a choice in place of a typed `_target_`, and dicts that add their entries.

    A target stays as it is where its group's choice is typed too, or no schema or several have it.

    Raises:
        UserError: a class of torch.optim has no schema, or a dict has no entries.
    """
    typed, dicts = set(map(override_key, argv)), set(_dict_keys())
    completed = []
    for argument in argv:
        key, value = split_override(argument) or ("", "")
        group = key.removesuffix(_SUFFIX)
        if key.endswith(_SUFFIX) and group in config_groups() and group not in typed:
            targets = split_commas(value) if is_multirun(argv) else [value]
            choices = [_choice(group, target.strip(" '\"")) for target in targets]
            completed.append(f"{group}={','.join(filter(None, choices))}" if all(choices) else argument)
        else:
            adds = key in dicts and argument.startswith(f"{key}=") and value.startswith("{")
            if adds and not value.strip("{} "):
                raise UserError(f"{argument} adds nothing: name its entries, {key}={{NAME:VALUE}}")
            below = any(key.startswith(f"{node}.") for node in NAMED_NODES) and argument.startswith(key)
            completed.append(f"+{argument}" if adds else f"++{argument}" if below else argument)
    return completed


def _choice(group: str, target: str) -> str | None:
    """Return the one choice of `group` whose schema has `target`."""
    schemas = {name.partition("/")[2]: node for name, node in SCHEMAS.items() if name.startswith(f"{group}/")}
    found = [choice for choice, node in schemas.items() if getattr(node, "_target_", None) == target]
    if not found and group == "optimizer":
        refuse_without_schema(target)
    return found[0] if len(found) == 1 else None


def _dict_keys() -> Iterator[str]:
    """Yield the dotted keys of every schema that hold a dict."""
    for name, node in SCHEMAS.items():
        yield from _dicts_below(node, "" if name == "config" else f"{name.partition('/')[0]}.")


def _dicts_below(node: Any, prefix: str) -> Iterator[str]:
    hints = get_type_hints(node)
    for field in fields(node):
        hint = hints[field.name]
        for kind in (hint, *get_args(hint)):
            if is_dataclass(kind):
                yield from _dicts_below(kind, f"{prefix}{field.name}.")
        if get_origin(hint) is dict:
            yield f"{prefix}{field.name}"
