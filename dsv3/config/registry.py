"""Register schemas where they are written: as choices of a config group, or for files of conf/ to extend.

A schema that holds all there is to say of a choice is the choice: `@schema("schedule/wsd")` alone makes
`schedule=wsd` work. A choice that sets values of its own is a file, conf/GROUP/CHOICE.yaml, which extends the
schema: `defaults: [/schema/GROUP@_here_, _self_]`.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from dsv3.errors import UserError

T = TypeVar("T", bound=type)

CONF = Path(__file__).resolve().parents[1] / "conf"
"""The config groups. In a checkout it is a link to conf/ beside the package."""

ROOT = CONF.parents[1]
"""The folder that holds the package: the checkout, or site-packages."""

SCHEMAS: dict[str, Any] = {}
"""Every schema by its name below `/schema/`."""

LAYOUTS, RECIPES, RECIPES_LR = "layouts", "recipes", "recipes_lr"
"""Tables in conf/ that `model` and `parallel` choose from, so that they are no groups of their own."""

_CHOICES: dict[str, dict[str, Any]] = {}


@dataclass
class Buildable:
    """Base of a schema that `strict.build` makes an object of: the fields are the constructor's arguments."""

    _target_: str = ""
    _recursive_: bool = False
    _convert_: str = "object"


def command(program: str) -> list[str]:
    """Return the words that start `train` or `convert`: `python train.py`, or dsv3-train where installed."""
    return ["python", f"{program}.py"] if (ROOT / f"{program}.py").is_file() else [f"dsv3-{program}"]


def schema(name: str, choice: str | None = None) -> Callable[[T], T]:
    """Return a class decorator that registers a schema as `name`: GROUP, or GROUP/CHOICE.

    A schema named GROUP/CHOICE is that choice, unless a file of conf/ is. `choice` makes one named GROUP a
    choice too. UserError for a name that another class has.
    """
    group, _, own = name.partition("/")

    def register_class(node: T) -> T:
        taken = SCHEMAS.get(name)
        if taken is not None and (taken.__module__, taken.__name__) != (node.__module__, node.__name__):
            raise UserError(
                f"{node.__module__}.{node.__name__}: {taken.__name__} is {name} already; take another name"
            )
        SCHEMAS[name] = node
        if chosen := own or choice:
            _CHOICES.setdefault(group, {})[chosen] = node
        return node

    return register_class


def config_groups(*more: Path) -> dict[str, list[str]]:
    """Return the choices of every config group: files of conf/ and of `more`, and schemas that are one."""
    groups: dict[str, set[str]] = {}
    for folder in (folder for conf in (CONF, *more) for folder in conf.iterdir() if folder.is_dir()):
        groups.setdefault(folder.name, set()).update(path.stem for path in folder.glob("*.yaml"))
    for group, choices in _CHOICES.items():
        groups.setdefault(group, set()).update(choices)
    return {group: sorted(choices) for group, choices in sorted(groups.items())}


def choice_schema(group: str, choice: str) -> Any:
    """Return the schema that is this choice; None where a file of conf/ is."""
    return None if (CONF / group / f"{choice}.yaml").is_file() else _CHOICES.get(group, {}).get(choice)


def recipes() -> dict[str, dict[str, Any]]:
    """Return the rows of conf/recipes.yaml by model."""
    return _table(RECIPES)


def register() -> None:
    """Make schemas, choices, layouts and recipes known to Hydra."""
    from hydra.core.config_store import ConfigStore  # planning imports this file, and does without hydra

    store = ConfigStore.instance()
    for name, node in SCHEMAS.items():
        group, _, last = f"schema/{name}".rpartition("/")
        store.store(name=last, group=group, node=node)
    for group, choices in _CHOICES.items():
        for choice in choices:
            if node := choice_schema(group, choice):
                store.store(name=choice, group=group, node=node)
    for name, parallel in _layouts():
        store.store(name=name, group=LAYOUTS, node=parallel, package="parallel")
    for model, row in recipes().items():
        values = {key: row[key] for key in ("schedule", "train")}
        store.store(name=model, group=RECIPES, node=values, package="_global_")
        # The reports' learning rates are AdamW's: another optimizer keeps its own.
        store.store(name=f"{model}-adamw", group=RECIPES_LR, node=row["optimizer"], package="optimizer")


def _layouts() -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the rows of conf/layouts.yaml as values of the `parallel` node, named MODEL-PRESET."""
    for model, presets in _table(LAYOUTS).items():
        for preset, row in presets.items():
            degrees = {axis: degree for axis, degree in row.items() if axis != "world"}
            yield f"{model}-{preset}", {"degrees": degrees, "min_world_size": row["world"]}


@cache
def _table(name: str) -> dict[str, dict[str, Any]]:
    """Return conf/NAME.yaml."""
    import yaml  # planning imports this file, and starts without it

    rows: dict[str, dict[str, Any]] = yaml.safe_load((CONF / f"{name}.yaml").read_text())
    return rows
