"""resume=RUN: compose a command over the config of a run, and say what differs and of which kind it is.

The run's own config.yaml supplies every default, so that a changed file or a newer default does not change
the run. What is typed now acts over it. The command is also composed as the run was started, from the files
of today: what these would have changed is told as taken from the run.
"""

import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, get_args, get_type_hints

import yaml
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dsv3.checkpoint.directory import CONFIG_FILE, is_hf_checkpoint
from dsv3.config.checkpoint import HF_PREFIX, absolute_path
from dsv3.config.convergence import (
    ABSENT,
    EXTENT,
    LOAD,
    Difference,
    Kind,
    differences,
    flatten,
    kind,
    shown,
    told_differences,
)
from dsv3.config.key_types import KeyType, key_types
from dsv3.config.limits import WHOLE
from dsv3.config.model import ModelConfig
from dsv3.config.overrides import compose, override_key, split_override
from dsv3.config.registry import SCHEMAS, Stored, config_groups
from dsv3.config.root import Config
from dsv3.config.strict import check_target, escape_interpolation, to_absolute_yaml
from dsv3.config.upgrade import RECOUNTED, recounted_values, upgrade_node, upgrade_override
from dsv3.errors import UserError, quoted
from dsv3.launch.checkpoint_defaults import filled
from dsv3.launch.run_dir import OVERRIDES_FILE, git_commit, read_environment
from dsv3.untrusted_files import BadFile, read_yaml, require_no_pipes

_PLAIN = ("train", "checkpoint")
"""Nodes of the root that a run keeps and that are no group; `run` and `task` are those of the command."""

ONCE = {"train.stop_after": None, "data.allow_change": False}
"""Keys that count for the command in which they are typed, by their value where they are not."""

_RUN_DIR = "give the directory of a run, as outputs/TIME"

_MISSING, _WARMUP = "???", "schedule.warmup_steps"


@dataclass(frozen=True)
class ResumedRun:
    """A run as its files describe it: data, from which nothing is built that strict.py has not checked."""

    directory: Path
    config: dict[str, Any]
    """By today's names of keys and classes."""
    overrides: list[str]
    """As the run was started, by today's names, without what counts only when it is typed."""
    environment: dict[str, Any]
    recounted: dict[str, Any] = field(default_factory=dict)
    """Numbers that the run has by older names, in units that are not those of today."""

    @classmethod
    def read(cls, directory: Path) -> "ResumedRun":
        """Read the files of a run; UserError where the directory holds none or a file is damaged."""
        file = directory / CONFIG_FILE
        if not file.is_file():
            raise UserError(f"resume={directory} {_no_run(directory)}")
        require_no_pipes(directory)
        stored = read_yaml(file)
        try:
            config, recounted = upgrade_node(stored), recounted_values(stored)
            steps = config["schedule"]["total_steps"]
            if not isinstance(config["model"], dict) or steps is None:
                raise TypeError
        except (KeyError, TypeError):
            raise UserError(
                f"resume={directory}: {CONFIG_FILE} has no model and no schedule.total_steps; "
                "is it a run directory?"
            ) from None
        if type(steps) is not int or not 0 < steps <= WHOLE:
            told = f"{CONFIG_FILE} has schedule.total_steps={quoted(steps)}"
            raise UserError(f"resume={directory}: {told}, which must be a whole number from 1 to {WHOLE:,}")
        overrides = _stored_overrides(directory)
        return cls(directory, config, overrides, read_environment(directory), recounted)

    @property
    def config_dirs(self) -> list[str]:
        """Return the folders of config files that the run was composed with."""
        stored = self.environment.get("config_dirs")
        return [str(folder) for folder in stored] if isinstance(stored, list) else []

    @property
    def choices(self) -> dict[str, str]:
        """Return the names of the run's choices by group, as far as they are dsv3's own.

        The names stand in the defaults list that Hydra reads, where a path would lead to any file.
        """
        stored = self.environment.get("choices")
        typed = dict(pair for pair in map(split_override, self.overrides) if pair)
        named = {"model": "debug"} | typed | (stored if isinstance(stored, dict) else {})
        groups = config_groups()
        return {group: str(name) for group, name in named.items() if name in groups.get(group, ())}

    @property
    def filled_in(self) -> list[str]:
        """Return the keys of values that were filled in."""
        stored = self.environment.get("filled_in")
        return [str(key) for key in stored] if isinstance(stored, list) else []

    def named_choices(self, composed: Mapping[str, str]) -> dict[str, str]:
        """Return the choices of a command by name, where it has taken the run's by the run's names."""
        stored = self.environment.get("choices")
        own = {str(group): str(name) for group, name in stored.items()} if isinstance(stored, dict) else {}
        typed = {group: name for group, name in composed.items() if name not in ("stored", "None")}
        return dict(composed) | own | typed

    def merged(self, typed: Sequence[str]) -> list[str]:
        """Return the run's overrides followed by those typed now, of which each key has the last word."""
        return list({override_key(a): a for a in [*self.overrides, *typed]}.values())

    def is_automatic(self, key: str) -> bool:
        """Return True for a value that was filled in to suit the layout, and is filled in anew on each."""
        if kind(key) is Kind.learnt:
            return False
        if "filled_in" in self.environment:
            return key in self.filled_in
        typed = {override_key(override) for override in self.overrides}
        return key == "train.microbatch_size" and not {key, "experiments"} & typed

    def defaults(self, typed: Sequence[str], allow: Sequence[str]) -> Stored:
        """Return the run's values as defaults of a command; groups that are `typed` bring their own.

        `allow` are the modules of run.allow_targets.

        Raises:
            UserError: a value is not possible today, or decides what is learnt and is not known today.
        """
        nodes: dict[str, Any] = {}
        values: dict[str, Any] = {}
        for name, schema, kept, unknown in self._nodes(typed, allow):
            learnt = [key for key in unknown if kind(key) is Kind.learnt and unknown[key] is not None]
            if learnt:
                raise UserError(
                    f"resume={self.directory} has {learnt[0]}={shown(unknown[learnt[0]])}, which this "
                    "version of dsv3 does not know: go on with the version that made the run"
                )
            if name in _PLAIN:
                values[name] = kept
            else:
                nodes[name] = self._typed(name, schema, kept)
        automatic = dict.fromkeys(key for key in flatten(self.config) if self.is_automatic(key))
        for key, value in (automatic | ONCE).items():
            node, _, name = key.rpartition(".")
            target = values.get(node, nodes.get(node))
            if target is not None and name in target:
                target[name] = value
        # Also where another schedule is typed: its end belongs to the run.
        values["schedule"] = {"total_steps": self.config["schedule"]["total_steps"]}
        model: Any = OmegaConf.to_object(self._typed("model", ModelConfig, self.config["model"]))
        return Stored(nodes, escape_interpolation(values), filled(model, None), self.choices, recipe=False)

    def _nodes(
        self, typed: Sequence[str], allow: Sequence[str]
    ) -> Iterator[tuple[str, Any, dict[str, Any], dict[str, Any]]]:
        """Yield name, schema, values and unknown values of the stored nodes that a command takes over."""
        chosen, hints = set(map(override_key, typed)), get_type_hints(Config)
        for f in fields(Config):
            node = self.config.get(f.name)
            if isinstance(node, dict) and f.name not in ("run", "task") and f.name not in chosen:
                schema = hints[f.name] if f.name in _PLAIN else self._schema(f.name, node, allow)
                yield f.name, schema, *_prune(schema, node, f"{f.name}.")

    def unknown(self, typed: Sequence[str], allow: Sequence[str]) -> dict[str, Any]:
        """Return the stored values that today's code does not have and does without."""
        found = [unknown for _, _, _, unknown in self._nodes(typed, allow)]
        return {key: value for values in found for key, value in values.items()}

    def _schema(self, group: str, node: dict[str, Any], allow: Sequence[str]) -> Any:
        """Return the schema of `group` that a stored node fits best: by its class, then by its keys."""
        target, named = str(node.get("_target_", "")), "_target_" in node
        schemas = [each for name, each in SCHEMAS.items() if name == group or name.startswith(f"{group}/")]
        if named and not any(_target(schema) == target for schema in schemas):
            check_target(target, f"{self.directory / CONFIG_FILE}: {group}._target_", allow)

        def misfit(schema: Any) -> tuple[bool, int, int]:
            unknown = _prune(schema, node, "")[1]
            return _target(schema) != target, len(unknown), len(fields(schema))

        return min(schemas, key=misfit)

    def _typed(self, group: str, schema: Any, node: dict[str, Any]) -> Any:
        try:
            return OmegaConf.merge(OmegaConf.structured(schema), escape_interpolation(node))
        except OmegaConfBaseException as error:
            reason = str(error).splitlines()[0]
            raise UserError(
                f"resume={self.directory}: what {CONFIG_FILE} says of {group} is not possible: {reason}"
            ) from None


def resume_notes(run: ResumedRun, config: Config, typed: Sequence[str], folders: Sequence[str]) -> list[str]:
    """Return lines on all that differs between the run, the files of today and what is typed.

    `config` is completed, `typed` are the overrides of this command, and `folders` its config directories.
    """
    now, stored = flatten(to_absolute_yaml(config)), flatten(run.config)
    changes = [each for each in differences(stored, now) if each.key not in ONCE]
    new = [each for each in changes if each.a == ABSENT and not _chosen(each.key, typed)]
    typed_changes = [each for each in changes if each not in new]
    by_files, notes = _composed_from_files(run, typed, folders)
    keys = set(map(override_key, typed))
    for key, value in run.recounted.items():
        today = RECOUNTED[key]
        if today not in keys:
            default = f"the default of today, {today}={shown(now[today])}, takes its place"
            notes.append(
                f"counted otherwise in the run, {kind(today).value}: {key}={shown(value)}; {default}"
            )
    unknown = run.unknown(typed, config.run.allow_targets)
    if unknown:
        names = ", ".join(f"{key}={shown(value)}" for key, value in unknown.items())
        notes.append(f"not known to this version and left out: {names}")
    changes = [each for each in changes if each.key not in unknown]
    taken = [
        Difference(key, stored[key], value, kind(key))
        for key, value in by_files.items()
        if key in stored and stored[key] == now.get(key) != value and key not in keys | {*ONCE, LOAD}
    ]
    for each in Kind:
        told = [f"{d.key}={shown(d.a)} (the files say {shown(d.b)} now)" for d in taken if d.kind is each]
        if told:
            notes.append(f"taken from the run, {each.value}: {', '.join(told)}")
    chosen, rest = _other_choices(run, typed, typed_changes)
    for each in Kind:
        told = [text for group, text in chosen.items() if kind(group) is each]
        told += told_differences([d for d in rest if d.kind is each and d.key not in EXTENT])
        if told:
            notes.append(f"changes {each.value}: {', '.join(told)}")
    if extent := [str(d) for d in rest if d.key in EXTENT]:
        notes.append(f"changes only how far it goes: {', '.join(extent)}")
    if told := [f"{d.key}={shown(d.b)}" for d in new if d.kind is Kind.learnt and d.b is not None]:
        notes.append(f"newer than the run, with the defaults of today: {', '.join(told)}")
    return notes + list(_code_note(run))


def _no_run(directory: Path) -> str:
    """Return what a directory without a run is, and what to type instead of it."""
    if not directory.exists():
        return f"does not exist: {_RUN_DIR}"
    if not directory.is_dir():
        return f"is a file: {_RUN_DIR}"
    load = shlex.join([f"checkpoint.load={directory}"])
    for run in (directory.parent, directory.parent.parent):
        if "checkpoints" in (directory.name, directory.parent.name) and (run / CONFIG_FILE).is_file():
            newest = shlex.join([f"resume={run}"])
            new = f"; {load} begins a new run from this one" if (directory / ".metadata").is_file() else ""
            return f"lies in a run, which goes on from its newest checkpoint: {newest}{new}"
    if jobs := sorted(directory.glob(f"*/{CONFIG_FILE}"), key=lambda file: (len(str(file)), str(file))):
        first = shlex.join([f"resume={jobs[0].parent}"])
        names = ", ".join(file.parent.name for file in jobs[:8]) + (", ..." if len(jobs) > 8 else "")
        return f"holds runs, and one is resumed at a time: {first} (there are {names})"
    if is_hf_checkpoint(directory):
        hf = shlex.join([f"checkpoint.load={HF_PREFIX}{directory}"])
        return f"is a HuggingFace checkpoint and no run: {hf} begins a new run from its weights"
    if (directory / ".metadata").is_file():
        return f"is a checkpoint without its run: {load} begins a new run from it"
    return f"holds no run, there is no {CONFIG_FILE} in it: {_RUN_DIR}"


def _other_choices(
    run: ResumedRun, typed: Sequence[str], changes: Sequence[Difference]
) -> tuple[dict[str, str], list[Difference]]:
    """Return by group the other choices that are typed, and the changes that these do not tell already.

    A choice tells the keys that come and go with it, not a value that both choices have.
    """
    pairs = dict(pair for pair in map(split_override, typed) if pair)
    chosen = {
        group: f"{group} {before} -> {pairs[group]}"
        for group, before in run.choices.items()
        if group in pairs and pairs[group] != before and any(d.key.startswith(f"{group}.") for d in changes)
    }
    rest = [
        d
        for d in changes
        if d.key.partition(".")[0] not in chosen
        or not (d.a in (None, ABSENT) or d.b in (None, ABSENT) or d.key.endswith("._target_"))
    ]
    return chosen, rest


def _chosen(key: str, typed: Sequence[str]) -> bool:
    """Return True where `key`, or a node above it, is among the typed overrides, or an experiment is."""
    keys = set(map(override_key, typed))
    parts = key.split(".")
    return bool(keys & {"experiments", *(".".join(parts[:count]) for count in range(1, len(parts) + 1))})


def _composed_from_files(
    run: ResumedRun, typed: Sequence[str], folders: Sequence[str]
) -> tuple[dict[str, Any], list[str]]:
    """Return the values that the files of today give to the run's overrides, and lines about files gone.

    The folders that the run remembers are read as data: composing runs nothing of theirs, and nothing is
    built from the result.
    """
    remembered = [folder for folder in run.config_dirs if folder not in folders]
    notes = [
        f"--config-dir={folder} is gone: the run's own values serve"
        for folder in remembered
        if not Path(folder).is_dir()
    ]
    search = [*folders, *(folder for folder in remembered if Path(folder).is_dir())]
    overrides = [each for each in run.merged(typed) if override_key(each).split(".")[0] != "run"]
    try:
        composed = compose(overrides, [f"file://{folder}" for folder in search])
        values = flatten(OmegaConf.to_container(composed, resolve=True, enum_to_str=True))
    except (HydraException, OmegaConfBaseException, OSError, ValueError, yaml.YAMLError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        return {}, [*notes, f"the files of today do not give this run ({reason}): the run's own values serve"]
    given = {override_key(override) for override in overrides}
    if LOAD in given and "model" not in given:
        values = {key: value for key, value in values.items() if not key.startswith(("model.", "tokenizer."))}
    types = key_types([pair for pair in map(split_override, overrides) if pair])
    known = {key: value for key, value in values.items() if value not in (None, _MISSING, "auto")}
    if _WARMUP in run.filled_in:  # shortened to suit the schedule: the files do not say this number
        known.pop(_WARMUP, None)
    return {key: _absolute(value, types.get(key)) for key, value in known.items()}, notes


def _absolute(value: Any, type_: KeyType | None) -> Any:
    """Return a path as a run stores it; any other value as it is."""
    if type_ is None or KeyType.path not in type_ or not isinstance(value, str):
        return value
    return absolute_path(value, KeyType.hub_name in type_)


def _code_note(run: ResumedRun) -> Iterator[str]:
    """Yield a line where the run was last trained by another version of this code."""
    before, now = run.environment.get("git_commit"), git_commit()
    if isinstance(before, str) and now is not None and before != now:
        yield f"other code: the run was trained by commit {before[:12]}, this is {now[:12]}{_changed(now)}"


def _changed(commit: str) -> str:
    return " with changes" if commit.endswith("+changes") else ""


def _target(schema: Any) -> str:
    return str(getattr(schema, "_target_", ""))


def _prune(schema: Any, node: Mapping[str, Any], path: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return a stored node with the keys that `schema` has, and the others by dotted keys below `path`."""
    hints = get_type_hints(schema)
    kept: dict[str, Any] = {}
    unknown: dict[str, Any] = {}
    for key, value in node.items():
        nested = [each for each in (hints.get(key), *get_args(hints.get(key))) if is_dataclass(each)]
        if key in ("_recursive_", "_convert_"):
            continue  # they say how instantiate() reads a node: the schema's word, never a file's
        if key not in hints:
            unknown |= flatten({key: value}, path)
        elif nested and isinstance(value, dict):
            kept[key], extra = _prune(nested[0], value, f"{path}{key}.")
            unknown |= extra
        else:
            kept[key] = value
    return kept, unknown


def _stored_overrides(directory: Path) -> list[str]:
    """Return the overrides a run was started with, without those that count only when typed.

    The file is data: an override of Hydra's own node (callbacks, launchers) or a flag (--config-dir) could
    run anything, so it is refused, and `run.allow_targets` is dropped. Names of older code become today's.
    """
    try:
        stored = read_yaml(directory / OVERRIDES_FILE)
        pairs = [(split_override(argument), argument) for argument in stored or []]
    except (BadFile, TypeError) as error:
        raise UserError(f"resume={directory}: {OVERRIDES_FILE} cannot be read ({error})") from None
    for pair, argument in pairs:
        if pair is None or "hydra" in re.split(r"[./@]", pair[0]):
            raise UserError(
                f"resume={directory}: {OVERRIDES_FILE} holds {quoted(argument)}, which a run never stores"
            )
    # Nothing of `run` is kept, however it was written: the user types where to resume and what to trust.
    upgraded = [
        upgrade_override(argument)
        for pair, argument in pairs
        if pair and pair[0] not in ONCE and pair[0].split(".")[0] != "run"
    ]
    return [argument for argument in upgraded if argument is not None]
