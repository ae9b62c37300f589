"""What happens to the arguments before Hydra parses them: quoting, resume, the machine's defaults."""

import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import yaml
from hydra._internal.utils import get_args_parser
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Quote, QuotedString
from omegaconf import OmegaConf

from dsv3.config import literal
from dsv3.runtime.errors import UserError

TEXT_KEYS = frozenset(
    {"task.prompt", "task.runs", "resume", "input", "output", "run.dir"}
    | {"checkpoint.load", "data.path", "model.path", "tokenizer.path"}
)
"""Keys whose values people type as they are: paths and prompts."""

PATH_KEYS = frozenset({"data.path", "data.cache_dir", "model.path", "tokenizer.path"})
"""Keys whose relative paths a stored run could not find from another directory."""

_OVERRIDE = re.compile(r"(?P<prefix>[+~]{0,2})(?P<key>\w[\w./@-]*)=(?P<value>.*)", re.DOTALL)
_QUOTED = r"(?:'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\")"


def prepare(argv: Sequence[str]) -> list[str]:
    """The arguments as Hydra is to see them: resume expanded, text quoted, defaults of this machine."""
    multirun = is_multirun(argv)
    if multirun and under_launcher():
        raise UserError("-m sweeps start their own jobs: run them with plain python, not under torchrun")
    if "run.resume" in map(_identity, argv):
        raise UserError("run.resume is not for typing: resume=RUN_DIR goes on with a run")
    arguments = _expand_resume(argv, multirun)
    arguments = quote_texts(arguments)
    return arguments + _machine_defaults(arguments)


def flags_first(arguments: Sequence[str]) -> list[str]:
    """The arguments with flags before overrides, as Hydra wants them; UserError for an unknown flag."""
    parser = get_args_parser()
    parser.error = _refuse_flag  # type: ignore[method-assign]  # it would print a usage of Hydra's and exit
    overrides = parser.parse_intermixed_args(list(arguments)).overrides
    return [*(argument for argument in arguments if argument not in overrides), *overrides]


def quote_texts(argv: Sequence[str]) -> list[str]:
    """The arguments with paths and prompts quoted, so that Hydra reads them as they were typed."""
    multirun = is_multirun(argv)
    return [_quote_argument(argument, multirun) for argument in argv]


def is_multirun(argv: Sequence[str]) -> bool:
    """Whether this is a Hydra sweep."""
    return "-m" in argv or "--multirun" in argv


def under_launcher() -> bool:
    """Whether torchrun started this process as one of several."""
    return "RANK" in os.environ


def split_override(argument: str) -> tuple[str, str] | None:
    """Key (without + or ~) and value of `key=value`; None for flags and anything else."""
    found = _OVERRIDE.fullmatch(argument)
    return (found["key"], found["value"]) if found else None


def quote(value: str) -> str:
    """`value` so that Hydra's grammar and OmegaConf's interpolation give back exactly it."""
    return str(QuotedString(literal(value), Quote.single).with_quotes())


def _refuse_flag(message: str) -> NoReturn:
    raise UserError(f"{message} (--help tells what there is)")


def absolute_paths(overrides: Sequence[str]) -> list[str]:
    """Overrides as a run stores them: with absolute paths, which a resume from elsewhere finds."""
    return [_absolute(override) for override in overrides]


def _absolute(override: str) -> str:
    found = _OVERRIDE.fullmatch(override)
    if not found or found["key"] not in PATH_KEYS or found["value"] in ("", "null"):
        return override
    value = OverridesParser.create().parse_override(override).value()
    # The parser keeps the escapes that OmegaConf takes away when it reads the value.
    path = str(OmegaConf.create({"path": str(value)}).path)
    return f"{found['prefix']}{found['key']}={quote(str(Path(path).absolute()))}"


def _quote_argument(argument: str, multirun: bool) -> str:
    found = _OVERRIDE.fullmatch(argument)
    if not found or found["key"] not in TEXT_KEYS or found["value"] in ("", "null"):
        return argument
    parts = [found["value"]]
    if multirun:  # each part of a sweep may be quoted, and then its commas are its own
        parts = re.findall(rf"{_QUOTED}(?=,|\Z)|[^,]+", found["value"], re.DOTALL)
    quoted = ",".join(part if _is_quoted(part) or part == "null" else quote(part) for part in parts)
    return f"{found['prefix']}{found['key']}={quoted}"


def _is_quoted(value: str) -> bool:
    """Whether the user has quoted the whole value for Hydra already."""
    return re.fullmatch(_QUOTED, value, re.DOTALL) is not None


def _expand_resume(argv: Sequence[str], multirun: bool) -> list[str]:
    """Replace `resume=DIR` by the run's stored overrides, the new ones after them."""
    resumes = [argument for argument in argv if argument.startswith("resume=")]
    if not resumes:
        return list(argv)
    if multirun or len(resumes) > 1:
        raise UserError("resume= goes on with one run: give it once and without -m")
    directory = Path(_unquote(resumes[0].removeprefix("resume="))).absolute()
    typed = [argument for argument in argv if argument != resumes[0]]
    merged = {_identity(a): a for a in [*_stored_overrides(directory), *typed]}
    if "schedule.total_steps" not in merged:
        merged["schedule.total_steps"] = f"schedule.total_steps={_stored_total_steps(directory)}"
    merged["run.dir"] = f"run.dir={quote(str(directory))}"
    merged["run.resume"] = "run.resume=true"
    return list(merged.values())


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
    dropped = ("train.stop_after", "checkpoint.load")
    return [
        argument
        for pair, argument in pairs
        if pair and pair[0] not in dropped and pair[0].split(".")[0] != "run"
    ]


def _stored_total_steps(directory: Path) -> int:
    try:
        return int(yaml.safe_load((directory / "config.yaml").read_text())["schedule"]["total_steps"])
    except (OSError, yaml.YAMLError, KeyError, TypeError, ValueError):
        raise UserError(
            f"resume={directory}: config.yaml has no schedule.total_steps; is it a run's?"
        ) from None


def _identity(argument: str) -> str:
    pair = split_override(argument)
    return pair[0] if pair else argument


def _unquote(value: str) -> str:
    return value[1:-1] if _is_quoted(value) else value


def _machine_defaults(arguments: Sequence[str]) -> list[str]:
    """bf16 where there is a GPU; what the user chose stands."""
    chosen = {_identity(argument) for argument in arguments}
    if "precision" in chosen or "experiments" in chosen or shutil.which("nvidia-smi") is None:
        return []
    return ["precision=bf16"]
