"""Register schemas where they are written: as choices of a config group, or for files of conf/ to extend.

A schema that holds all there is to say of a choice is the choice: `@schema("schedule/wsd")` alone makes
`schedule=wsd` work. A choice that sets values of its own is a file, conf/GROUP/CHOICE.yaml, which extends the
schema: `defaults: [/schema/GROUP@_here_, _self_]`.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypeVar, get_args, get_type_hints

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

RECIPE_SCHEDULE, DEFAULT_SCHEDULE = "recipe_schedule", "warmup_cosine"
"""The resolver in conf/config.yaml and the key of a recipe, and the schedule of models without one."""

PATH = {"path": True}
"""Metadata of a field that holds a path: `~` and variables are filled in, and a run stores it absolute."""

PATH_OR_NAME = {"path": True, "name": True}
"""The same for one that may also be a name, of a hub: it is a path where something is there."""

NAMED_NODES = {"data.sources": "data"}
"""Keys that hold nodes of a group by names of the user's own: KEY.NAME.X is described as GROUP.X is."""

STORED = "stored"
"""Values that a checkpoint carries: no group of the user's either."""

_CHOICES: dict[str, dict[str, Any]] = {}

_HANDED_OVER: dict[str, Any] = {}
"""What Hydra's ConfigStore, which is one per process, has been given, by group and name."""


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


def described_key(key: str) -> str:
    """Return the key that describes a dotted key: itself, or that of the group whose node has a name."""
    for node, group in NAMED_NODES.items():
        if key.startswith(f"{node}."):
            _, dot, rest = key.removeprefix(f"{node}.").partition(".")
            return f"{group}.{rest}" if dot else key
    return key


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


def choices_with_key(key: str) -> list[str]:
    """Return `GROUP=CHOICE` for the choices whose node has a dotted key, the default choice first."""
    group, *rest = key.split(".")
    if not rest or group not in (groups := config_groups()):
        return []
    default = default_choices().get(group)
    ordered = sorted(groups[group], key=lambda choice: (choice != default, choice))
    return [f"{group}={choice}" for choice in ordered if _has_key(_schema_of(group, choice), rest)]


def _schema_of(group: str, choice: str) -> Any:
    """Return the schema of a choice, also of one that a file of conf/ is; None where that is not known."""
    file = CONF / group / f"{choice}.yaml"
    extended = re.search(r"/schema/([\w/]+)@_here_", file.read_text()) if file.is_file() else None
    return SCHEMAS.get(extended[1]) if extended else choice_schema(group, choice)


def _has_key(node: Any, parts: list[str]) -> bool:
    """Return True where a schema has the key that `parts` lead to."""
    hint = get_type_hints(node).get(parts[0]) if is_dataclass(node) else None
    if hint is None or len(parts) == 1:
        return hint is not None
    return any(_has_key(kind, parts[1:]) for kind in (hint, *get_args(hint)))


def recipes() -> dict[str, dict[str, Any]]:
    """Return the rows of conf/recipes.yaml by model."""
    return _table(RECIPES)


def register_resolvers() -> None:
    """Register `recipe_schedule`, the schedule of a model's recipe, and `data_of_task`, a task's data."""
    from omegaconf import OmegaConf

    OmegaConf.register_new_resolver(RECIPE_SCHEDULE, recipe_schedule, replace=True)
    OmegaConf.register_new_resolver("data_of_task", data_of_task, replace=True)


def data_of_task(task: str) -> str:
    """Return the choice of `data` for a choice of `task`, unless another is typed or an experiment's."""
    return "input" if task == "prepare" else "stdlib"


def recipe_schedule(model: str) -> str:
    """Return the choice of `schedule` for a choice of `model`, unless another is typed or an experiment's."""
    own = recipes().get(model, {}).get(RECIPE_SCHEDULE)
    if own is None:
        return DEFAULT_SCHEDULE
    return str(own["choice"]) if len(own) == 1 else f"recipe_{model}"


def default_choices(root: str = "config") -> dict[str, str | None]:
    """Return the choice per group of conf/ROOT.yaml where no other is made."""
    import yaml
    from omegaconf import OmegaConf

    register_resolvers()
    entries = yaml.safe_load((CONF / f"{root}.yaml").read_text())["defaults"]
    pairs = [pair for entry in entries if isinstance(entry, dict) for pair in entry.items()]
    own = {group: choice for group, choice in pairs if not group.startswith(("override", "optional"))}
    chosen: dict[str, str | None] = OmegaConf.to_container(OmegaConf.create(own), resolve=True)  # type: ignore[assignment]
    return chosen


def register() -> None:
    """Make schemas, choices, layouts, recipes, resolvers and the limits of files known to Hydra."""
    from dsv3.config.preset_source import bound_presets

    bound_presets(CONF)
    register_resolvers()
    for name, node in SCHEMAS.items():
        group, _, last = f"schema/{name}".rpartition("/")
        _store(name=last, group=group, node=node)
    for group, choices in _CHOICES.items():
        for choice in choices:
            if node := choice_schema(group, choice):
                _store(name=choice, group=group, node=node)
    for name, parallel in _layouts():
        _store(name=name, group=LAYOUTS, node=parallel, package="parallel")
    for model, row in recipes().items():
        values = {key: row[key] for key in ("schedule", "train")}
        _store(name=model, group=RECIPES, node=values, package="_global_")
        own = row.get(RECIPE_SCHEDULE, {})
        if len(own) > 1:  # with values of its own, a choice that nobody types
            values = {key: value for key, value in own.items() if key != "choice"}
            shape = SCHEMAS[f"schedule/{own['choice']}"](**values)
            _store(name=f"recipe_{model}", group="schedule", node=shape)
        # The reports' learning rates are AdamW's: another optimizer keeps its own.
        _store(name=f"{model}-adamw", group=RECIPES_LR, node=row["optimizer"], package="optimizer")
        # Muon's update has the size of AdamW's: Moonlight takes AdamW's rate and decay over (section 2.2).
        taken = {key: value for key, value in row["optimizer"].items() if key in ("lr", "weight_decay")}
        _store(name=f"{model}-muon", group=RECIPES_LR, node=taken, package="optimizer")


@dataclass(frozen=True)
class Stored:
    """Values that a checkpoint carries, to compose a command over them."""

    defaults: Mapping[str, Any] = field(default_factory=dict)
    """Nodes by group: what the group is unless a choice is typed or an experiment's."""
    values: Mapping[str, Any] = field(default_factory=dict)
    """Values of other nodes, such as {"train": {"sequence_length": 64}}."""
    hf_model: Any = None
    """Node of the choice model=hf with its numbers filled in."""
    choices: Mapping[str, str] = field(default_factory=dict)
    """Names of the choices that `defaults` were, for the tables that go by them: a layout of the model."""
    recipe: bool = True
    """The recipe of a chosen model acts; a run that goes on keeps its own numbers."""


def register_stored(root: str, stored: Stored) -> str:
    """Make `stored` known to Hydra as defaults of conf/ROOT.yaml; return the name of that new root."""
    import yaml

    name = "stored"
    content = yaml.safe_load((CONF / f"{root}.yaml").read_text())
    if stored.hf_model is not None:
        _store(name="hf", group="model", node=stored.hf_model)
    for group, node in stored.defaults.items():
        _store(name=name, group=group, node=node)
    _store(name=name, group=STORED, node=dict(stored.values), package="_global_")
    defaults = [
        {group: name if group in stored.defaults else choice for group, choice in entry.items()}
        if isinstance(entry, dict)
        else entry
        for entry in content["defaults"]
        if stored.recipe or f"optional {RECIPES}" not in entry
    ]
    if model := stored.choices.get("model"):
        for table in (LAYOUTS, RECIPES_LR):
            for entry in (entry for entry in defaults if f"optional {table}" in entry):
                entry[f"optional {table}"] = entry[f"optional {table}"].replace("${model}", model)
    # Before the experiment, whose values win as those of the command line do.
    names = [next(iter(entry)) if isinstance(entry, dict) else entry for entry in defaults]
    place = next(n for n, name in enumerate(names) if name == "experiments" or name.startswith("override "))
    content["defaults"] = [*defaults[:place], {STORED: name}, *defaults[place:]]
    _store(name=f"{root}_{name}", node=content)
    return f"{root}_{name}"


def _store(name: str, node: Any, group: str | None = None, package: str | None = None) -> None:
    """Hand a node to Hydra's ConfigStore unless it has it: all of them would take a tenth of a second."""
    from hydra.core.config_store import ConfigStore  # planning imports this file, and does without hydra

    place = f"{group}/{name}"
    if place not in _HANDED_OVER or _HANDED_OVER[place] != node:
        ConfigStore.instance().store(name=name, group=group, node=node, package=package)
        _HANDED_OVER[place] = node


def _layouts() -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the rows of conf/layouts.yaml as values of the `parallel` node, named MODEL-PRESET."""
    for model, presets in _table(LAYOUTS).items():
        for preset, row in presets.items():
            degrees = {axis: degree for axis, degree in row.items() if axis != "world"}
            yield f"{model}-{preset}", {"degrees": degrees, "min_world_size": row["world"]}


def layout_degrees(model: str, preset: str) -> dict[str, Any]:
    """Return the degrees that conf/layouts.yaml gives a choice of `model` under one of `parallel`, if any."""
    degrees: dict[str, Any] = dict(_layouts()).get(f"{model}-{preset}", {}).get("degrees", {})
    return degrees


@cache
def _table(name: str) -> dict[str, dict[str, Any]]:
    """Return conf/NAME.yaml."""
    import yaml  # planning imports this file, and starts without it

    rows: dict[str, dict[str, Any]] = yaml.safe_load((CONF / f"{name}.yaml").read_text())
    return rows
