"""The arguments before Hydra parses them: quoting, and resume=DIR."""

import importlib
import re
import shlex
from collections.abc import Sequence
from pathlib import Path

from hydra.core.override_parser.overrides_parser import OverridesParser

from dsv3.checkpoint.directory import CONFIG_FILE, find_checkpoint
from dsv3.cli.chosen_targets import choose_by_target
from dsv3.cli.hydra_node import refuse_hydra_overrides
from dsv3.config.overrides import (
    is_multirun,
    override_key,
    quote,
    quote_texts,
    split_override,
    typed_text,
    typed_texts,
)
from dsv3.config.registry import SCHEMAS, register_stored
from dsv3.errors import UserError
from dsv3.launch.job import under_launcher
from dsv3.launch.replayed_run import ReplayedRun
from dsv3.launch.resume import ResumedRun
from dsv3.launch.trained_on import carried_values, training_record
from dsv3.metrics.progress import phase


def prepare(argv: Sequence[str]) -> list[str]:
    """Return the arguments for Hydra: resume expanded, text quoted."""
    multirun = is_multirun(argv)
    if multirun and under_launcher():
        raise UserError(
            "-m sweeps start their own jobs: run them with plain python, not under torchrun or srun"
        )
    if "run.resume" in map(override_key, argv):
        raise UserError("run.resume cannot be set directly: resume=RUN_DIR continues a run")
    refuse_hydra_overrides(argv, "train")
    arguments = _expand_resume(argv, multirun)
    replay = _expand_replay(arguments, multirun)
    if replay is None and not multirun:
        arguments = _begin_with_checkpoint(arguments)
    arguments = replay or arguments
    arguments = quote_texts(choose_by_target(arguments))
    if multirun:
        _refuse_several_directories(arguments)
    return arguments


def prepare_convert(argv: Sequence[str]) -> list[str]:
    """Return the arguments of convert.py for Hydra, with texts quoted."""
    refuse_hydra_overrides(argv, "convert")
    return quote_texts(argv)


def import_user_modules(argv: Sequence[str]) -> list[str]:
    """Import the modules of `run.allow_targets`, whose schemas may be choices, and return their names."""
    lists = [argument for argument in argv if override_key(argument) == "run.allow_targets"]
    named = {module: told for told in lists for module in typed_texts(told)}
    for module, told in named.items():
        try:
            with phase(f"importing {module}"):
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
    return list(named)


def _expand_resume(argv: Sequence[str], multirun: bool) -> list[str]:
    """Replace `resume=DIR` by a root whose defaults are the run's values, for what is typed to act over."""
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
    root = register_stored("config", ResumedRun.read(directory).defaults(typed, _allowed_modules(typed)))
    return [*typed, f"run.dir={quote(str(directory))}", "run.resume=true", f"--config-name={root}"]


def _expand_replay(argv: Sequence[str], multirun: bool) -> list[str] | None:
    """Return task=replay over a root whose defaults are those of the run at the step; None for other tasks.

    Without a run and a step nothing is expanded, and the task says what is missing.
    """
    typed = dict(pair for pair in map(split_override, argv) if pair)
    task = SCHEMAS.get(f"task/{typed.get('task')}")
    if task is None or not task.replays:
        return None
    if multirun:
        raise UserError("task=replay computes one step: give it without -m")
    if "run.dir" in typed:
        raise UserError(f"task=replay writes no run directory: leave run.dir={typed['run.dir']} out")
    told = next((a for a in argv if override_key(a) == "task.run"), "")
    directory = Path(typed_text(told)).absolute() if typed.get("task.run") else None
    number = quote_texts([f"task.step={typed.get('task.step', '')}"])[0].partition("=")[2]
    if (
        directory is None
        or not (directory / CONFIG_FILE).is_file()
        or not re.fullmatch("[0-9]{1,15}", number)
    ):
        return list(argv)
    run = ReplayedRun.read(directory, max(1, int(number)))
    root = register_stored("config", run.defaults(argv, _allowed_modules(argv)))
    return [*argv, f"run.dir={quote(str(directory))}", "run.resume=true", f"--config-name={root}"]


def _begin_with_checkpoint(argv: Sequence[str]) -> list[str]:
    """Add the root of checkpoint.load's values where a key may be set that only its data or tokenizer has.

    Hydra would look for data.path in the default choice, before anything has read the checkpoint.
    """
    typed = dict(pair for pair in map(split_override, argv) if pair)
    nodes = {key.partition(".")[0] for key in typed if "." in key or key == "experiments"}
    load = next((argument for argument in argv if override_key(argument) == "checkpoint.load"), None)
    if load is None or typed["checkpoint.load"] == "null" or not nodes & {"data", "tokenizer", "experiments"}:
        return list(argv)
    task = SCHEMAS.get(f"task/{typed.get('task', 'train')}")
    if task is None:
        return list(argv)  # Hydra refuses it
    checkpoint = find_checkpoint(typed_text(load))
    stored = carried_values(checkpoint, training_record(checkpoint), task, _allowed_modules(argv))
    return [*argv, f"--config-name={register_stored('config', stored)}"]


def _allowed_modules(argv: Sequence[str]) -> list[str]:
    return [module for a in argv if override_key(a) == "run.allow_targets" for module in typed_texts(a)]


def _refuse_beside_resume(directory: Path, typed: Sequence[str]) -> None:
    """Raise UserError for arguments that resume= would ignore or give another meaning."""
    for key, value in filter(None, map(split_override, typed)):
        if key == "run.dir":
            raise UserError(f"resume={directory} continues in its own directory: leave run.dir={value} out")
        task = SCHEMAS.get(f"task/{value}") if key == "task" else None
        if task and task.replays:
            command = shlex.join([f"task={value}", f"task.run={directory}", "task.step=N"])
            raise UserError(f"resume= continues training; to compute a step again: {command}")
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
