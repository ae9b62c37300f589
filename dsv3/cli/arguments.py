"""What happens to the arguments before Hydra parses them: quoting, resume, the machine's defaults."""

import itertools
import re
import shlex
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import yaml
from hydra._internal.utils import get_args_parser
from hydra.core.override_parser.overrides_parser import OverridesParser

from dsv3.config.overrides import is_multirun, override_key, quote, quote_texts, split_override, typed_text
from dsv3.errors import UserError
from dsv3.launch.job import under_launcher


def prepare(argv: Sequence[str]) -> list[str]:
    """The arguments as Hydra is to see them: resume expanded, text quoted, defaults of this machine."""
    multirun = is_multirun(argv)
    if multirun and under_launcher():
        raise UserError(
            "-m sweeps start their own jobs: run them with plain python, not under torchrun or srun"
        )
    if "run.resume" in map(override_key, argv):
        raise UserError("run.resume is not for typing: resume=RUN_DIR goes on with a run")
    arguments = _expand_resume(argv, multirun)
    if "hydra.sweep.dir" in map(override_key, argv):
        raise UserError("hydra.sweep.dir is not for typing: run.dir=DIR says where a sweep's jobs go")
    arguments = quote_texts(arguments)
    if multirun:
        _refuse_several_directories(arguments)
    return arguments + _machine_defaults(arguments) + _sweep_defaults(arguments)


def flags_first(arguments: Sequence[str]) -> list[str]:
    """The arguments with flags before overrides, as Hydra wants them; UserError for an unknown flag."""
    arguments = [_with_value(*pair) for pair in itertools.zip_longest(arguments, arguments[1:], fillvalue="")]
    parser = get_args_parser()
    parser.error = _refuse_flag  # type: ignore[method-assign]  # it would print a usage of Hydra's and exit
    overrides = parser.parse_intermixed_args(list(arguments)).overrides
    return [*(argument for argument in arguments if argument not in overrides), *overrides]


def _with_value(argument: str, following: str) -> str:
    """`--info` with the value that it may leave out; it would take an override for it."""
    bare = argument == "--info" and (not following or "=" in following or following.startswith("-"))
    return "--info=all" if bare else argument


def _refuse_flag(message: str) -> NoReturn:
    raise UserError(f"{message} (--help tells what there is)")


def _expand_resume(argv: Sequence[str], multirun: bool) -> list[str]:
    """Replace `resume=DIR` by the run's stored overrides, the new ones after them."""
    resumes = [argument for argument in argv if argument.startswith("resume=")]
    if not resumes:
        return list(argv)
    if multirun or len(resumes) > 1:
        raise UserError("resume= goes on with one run: give it once and without -m")
    directory = Path(typed_text(resumes[0])).absolute()
    typed = [argument for argument in argv if argument != resumes[0]]
    _refuse_beside_resume(directory, typed)
    if "checkpoint.load" in map(override_key, typed):
        raise UserError(
            "resume= goes on from the run's own checkpoint, checkpoint.load= starts a new run: give one"
        )
    merged = {override_key(a): a for a in [*_stored_overrides(directory), *typed]}
    if "schedule.total_steps" not in merged:
        merged["schedule.total_steps"] = f"schedule.total_steps={_stored_total_steps(directory)}"
    merged["run.dir"] = f"run.dir={quote(str(directory))}"
    merged["run.resume"] = "run.resume=true"
    return list(merged.values())


def _refuse_beside_resume(directory: Path, typed: Sequence[str]) -> None:
    """UserError for what would be ignored, or mean something else, beside resume=."""
    for key, value in filter(None, map(split_override, typed)):
        if key == "run.dir":
            raise UserError(f"resume={directory} goes on in its own directory: leave run.dir={value} out")
        if key == "task" and value in ("evaluate", "generate"):
            command = shlex.join([f"task={value}", f"checkpoint.load={directory}"])
            raise UserError(f"resume= goes on with training; to {value} a run: {command}")


def _refuse_several_directories(arguments: Sequence[str]) -> None:
    """UserError for a sweep over run.dir: its jobs go into numbered directories of one."""
    for argument in arguments:
        if override_key(argument) == "run.dir":
            parsed = OverridesParser.create().parse_override(argument)
            if parsed.is_sweep_override():
                raise UserError(
                    f"{argument}: a sweep has one directory, in which its jobs are numbered; "
                    "a comma in its name needs quotes, \"run.dir='a,b'\""
                )


def _stored_overrides(directory: Path) -> list[str]:
    """The overrides a run was started with, less what only counts when typed.

    The file is data: an override of Hydra's own node (callbacks, launchers) or a flag (--config-dir)
    could run anything, so it is refused, and `run.allow_targets` is dropped.
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
    # Of `run` nothing is kept, however it was written: the user types where to go on and what to trust.
    return [
        argument
        for pair, argument in pairs
        if pair and pair[0] != "train.stop_after" and pair[0].split(".")[0] != "run"
    ]


def _stored_total_steps(directory: Path) -> int:
    try:
        return int(yaml.safe_load((directory / "config.yaml").read_text())["schedule"]["total_steps"])
    except (OSError, yaml.YAMLError, KeyError, TypeError, ValueError):
        raise UserError(
            f"resume={directory}: config.yaml has no schedule.total_steps; is it a run's?"
        ) from None


def _machine_defaults(arguments: Sequence[str]) -> list[str]:
    """bf16 where there is a GPU; what the user chose stands."""
    chosen = {override_key(argument) for argument in arguments}
    if "precision" in chosen or "experiments" in chosen or shutil.which("nvidia-smi") is None:
        return []
    return ["precision=bf16"]


def _sweep_defaults(arguments: Sequence[str]) -> list[str]:
    """No failed job ends an optuna study, unless the user set how many may; the plugin would allow none."""
    pairs = dict(pair for pair in map(split_override, arguments) if pair)
    if pairs.get("hydra/sweeper") != "optuna" or "hydra.sweeper.max_failure_rate" in pairs:
        return []
    return ["hydra.sweeper.max_failure_rate=1.0"]
