"""The arguments before Hydra parses them: quoting, resume=DIR, and the defaults of this machine."""

import importlib
import itertools
import re
import shlex
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import yaml
from hydra._internal.utils import get_args_parser
from hydra.core.override_parser.overrides_parser import OverridesParser

from dsv3.config.overrides import is_multirun, override_key, quote, quote_texts, split_override, typed_text
from dsv3.config.registry import SCHEMAS, config_groups
from dsv3.config.upgrade import upgrade_override
from dsv3.errors import UserError
from dsv3.launch.job import under_launcher

_KEPT = (("schedule", "total_steps"), ("schedule", "warmup_steps"), ("optimizer", "lr"), ("train", "steps"))


def prepare(argv: Sequence[str]) -> list[str]:
    """Return the arguments for Hydra: resume expanded, text quoted, defaults of this machine added."""
    multirun = is_multirun(argv)
    if multirun and under_launcher():
        raise UserError(
            "-m sweeps start their own jobs: run them with plain python, not under torchrun or srun"
        )
    if "run.resume" in map(override_key, argv):
        raise UserError("run.resume cannot be set directly: resume=RUN_DIR continues a run")
    arguments = _expand_resume(argv, multirun)
    if "hydra.sweep.dir" in map(override_key, argv):
        raise UserError("hydra.sweep.dir cannot be set directly: run.dir=DIR says where a sweep's jobs go")
    arguments = quote_texts(arguments)
    if multirun:
        _refuse_several_directories(arguments)
    return arguments + _machine_defaults(arguments) + _sweep_defaults(arguments)


def import_user_modules(argv: Sequence[str]) -> list[str]:
    """Import the modules of `run.allow_targets`, whose schemas may be choices, and return their names."""
    typed = [pair for argument in argv if (pair := split_override(argument))]
    lists = [value for key, value in typed if key == "run.allow_targets"]
    modules = [
        name.strip(" '\"") for value in lists for name in value.strip("[] ").split(",") if name.strip()
    ]
    for module in modules:
        told = f"run.allow_targets={lists[-1]}"
        try:
            importlib.import_module(module)
        except UserError:
            raise
        except ModuleNotFoundError as error:
            if error.name and f"{module}.".startswith(f"{error.name}."):
                raise UserError(
                    f"{told}: no module named {error.name!r}; put its folder on PYTHONPATH"
                ) from None
            raise UserError(f"{told}: {module} imports {error.name!r}, which is not there") from None
        except Exception as error:
            raise UserError(f"{told}: {module} cannot be imported: {type(error).__name__}: {error}") from None
    return modules


def user_config_dir(argv: Sequence[str]) -> Path | None:
    """Return the folder of --config-dir; UserError where a file has the name of a choice of dsv3."""
    typed = get_args_parser().parse_known_args(list(argv))[0].config_dir
    if not typed:
        return None
    folder = Path(typed).absolute()
    for group, choices in config_groups().items():
        for choice in choices:
            if (folder / group / f"{choice}.yaml").is_file():
                raise UserError(
                    f"{folder / group / choice}.yaml: {group}={choice} is dsv3's own; rename the file"
                )
    return folder


def flags_first(arguments: Sequence[str]) -> list[str]:
    """Return the arguments with flags before overrides, as Hydra wants; UserError for an unknown flag."""
    completed = []
    for argument, following in itertools.zip_longest(arguments, arguments[1:], fillvalue=""):
        # --info may leave its value out, and would take the next override for it.
        bare = argument == "--info" and (not following or "=" in following or following.startswith("-"))
        completed.append("--info=all" if bare else argument)
    parser = get_args_parser()
    parser.error = _refuse_flag  # type: ignore[method-assign]  # it would print a usage of Hydra's and exit
    overrides = parser.parse_intermixed_args(completed).overrides
    return [*(argument for argument in completed if argument not in overrides), *overrides]


def _refuse_flag(message: str) -> NoReturn:
    raise UserError(f"{message} (--help lists what there is)")


def _expand_resume(argv: Sequence[str], multirun: bool) -> list[str]:
    """Replace `resume=DIR` by the run's stored overrides, followed by the new ones."""
    resumes = [argument for argument in argv if argument.startswith("resume=")]
    if not resumes:
        return list(argv)
    if multirun or len(resumes) > 1:
        raise UserError("resume= continues one run: give it once and without -m")
    directory = Path(typed_text(resumes[0])).absolute()
    typed = [argument for argument in argv if argument != resumes[0]]
    _refuse_beside_resume(directory, typed)
    if "checkpoint.load" in map(override_key, typed):
        raise UserError(
            "resume= continues from the run's own checkpoint, checkpoint.load= starts a new run: give one"
        )
    merged = {override_key(a): a for a in [*_stored_overrides(directory), *typed]}
    for key, value in _stored_values(directory).items():
        merged.setdefault(key, f"{key}={value}")
    merged["run.dir"] = f"run.dir={quote(str(directory))}"
    merged["run.resume"] = "run.resume=true"
    return list(merged.values())


def _refuse_beside_resume(directory: Path, typed: Sequence[str]) -> None:
    """Raise UserError for arguments that resume= would ignore or give another meaning."""
    for key, value in filter(None, map(split_override, typed)):
        if key == "run.dir":
            raise UserError(f"resume={directory} continues in its own directory: leave run.dir={value} out")
        task = SCHEMAS.get(f"task/{value}") if key == "task" else None
        if task and task.reads_checkpoint:
            command = shlex.join([f"task={value}", f"checkpoint.load={directory}"])
            raise UserError(f"resume= continues training; to {value} a run: {command}")


def _refuse_several_directories(arguments: Sequence[str]) -> None:
    """Raise UserError for a sweep over run.dir: its jobs go into numbered directories of one."""
    for argument in arguments:
        if override_key(argument) == "run.dir":
            parsed = OverridesParser.create().parse_override(argument)
            if parsed.is_sweep_override():
                raise UserError(
                    f"{argument}: a sweep has one directory, in which its jobs are numbered; "
                    "a comma in its name needs quotes, \"run.dir='a,b'\""
                )


def _stored_overrides(directory: Path) -> list[str]:
    """Return the overrides a run was started with, without those that count only when typed.

    The file is data: an override of Hydra's own node (callbacks, launchers) or a flag (--config-dir) could
    run anything, so it is refused, and `run.allow_targets` is dropped. Names of older code become today's.
    """
    if not (directory / "config.yaml").is_file():
        raise UserError(f"resume={directory} holds no run: there is no config.yaml in it")
    try:
        stored = yaml.safe_load((directory / "overrides.yaml").read_text())
        pairs = [(split_override(argument), argument) for argument in stored or []]
    except (OSError, yaml.YAMLError, TypeError) as error:
        raise UserError(f"resume={directory}: overrides.yaml cannot be read ({error})") from None
    for pair, argument in pairs:
        if pair is None or "hydra" in re.split(r"[./@]", pair[0]):
            raise UserError(
                f"resume={directory}: overrides.yaml holds {argument!r}, which a run never stores"
            )
    # Nothing of `run` is kept, however it was written: the user types where to resume and what to trust.
    return [
        upgrade_override(argument)
        for pair, argument in pairs
        if pair and pair[0] != "train.stop_after" and pair[0].split(".")[0] != "run"
    ]


def _stored_values(directory: Path) -> dict[str, Any]:
    """Return the values that a run keeps from its config.yaml unless they are typed anew.

    These are the schedule's end, and what a model's recipe may set: a recipe may have come, or have changed,
    since the run began.
    """
    try:
        stored = yaml.safe_load((directory / "config.yaml").read_text())
        values = {f"{node}.{key}": stored[node][key] for node, key in _KEPT}
        return {key: float(value) if key == "optimizer.lr" else int(value) for key, value in values.items()}
    except (OSError, yaml.YAMLError, KeyError, TypeError, ValueError):
        raise UserError(
            f"resume={directory}: config.yaml has no schedule.total_steps; is it a run directory?"
        ) from None


def _machine_defaults(arguments: Sequence[str]) -> list[str]:
    """Return the default of bf16 where there is a GPU; the user's choice of precision wins."""
    chosen = {override_key(argument) for argument in arguments}
    if "precision" in chosen or "experiments" in chosen or shutil.which("nvidia-smi") is None:
        return []
    return ["precision=bf16"]


def _sweep_defaults(arguments: Sequence[str]) -> list[str]:
    """Return the default that lets an optuna study survive failed jobs; the plugin would allow none."""
    pairs = dict(pair for pair in map(split_override, arguments) if pair)
    if pairs.get("hydra/sweeper") != "optuna" or "hydra.sweeper.max_failure_rate" in pairs:
        return []
    return ["hydra.sweeper.max_failure_rate=1.0"]
