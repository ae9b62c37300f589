"""The flags of the command line: Hydra's own, of which those that dsv3 has no use for are refused."""

import argparse
import importlib.metadata
import itertools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from hydra._internal.utils import get_args_parser

from dsv3.config.overrides import is_multirun
from dsv3.config.registry import command, config_groups
from dsv3.errors import UserError

_REFUSED = {
    "config_name": "--config-name: the root is dsv3's own; experiments=NAME chooses a file of values for it",
    "config_path": "--config-path: the root is dsv3's own; --config-dir=DIR adds your own files",
    "experimental_rerun": "--experimental-rerun: resume=RUN_DIR continues a run",
}
"""Flags of Hydra that would replace the configuration whose keys dsv3 knows, and what does their work."""

_SHELLS = ("bash", "fish", "zsh")


def flags_first(arguments: Sequence[str]) -> list[str]:
    """Return the arguments with flags before overrides, as Hydra wants them."""
    completed = _with_values(arguments)
    overrides = _parser().parse_intermixed_args(completed).overrides
    return [*(argument for argument in completed if argument not in overrides), *overrides]


def check_flags(arguments: Sequence[str], program: str) -> argparse.Namespace:
    """Return the parsed flags; UserError for unknown ones, and for those that do nothing in this command."""
    typed = _parser().parse_intermixed_args(_with_values(arguments))
    for name, told in _REFUSED.items():
        if getattr(typed, name) is not None:
            raise UserError(told)
    if typed.multirun != is_multirun(arguments):
        raise UserError("write -m or --multirun on its own")
    if typed.multirun and program != "train":
        raise UserError(f"-m: {' '.join(command(program))} makes one conversion; start it once for each")
    modes = {"-m": typed.multirun, "--run": typed.run, "--cfg": typed.cfg, "--info": typed.info}
    chosen = [flag for flag, given in {**modes, "-sc": typed.shell_completion}.items() if given]
    if len(chosen) > 1:
        raise UserError(f"{' and '.join(chosen)} exclude each other: give one")
    if typed.resolve and not typed.cfg:
        raise UserError("--resolve goes with --cfg: --cfg job --resolve")
    if typed.package and not typed.cfg:
        raise UserError(f"--package goes with --cfg: --cfg job --package {typed.package}")
    if typed.config_dir is not None and not Path(typed.config_dir).is_dir():
        raise UserError(f"--config-dir={typed.config_dir} is no directory")
    if typed.shell_completion:
        _check_completion(typed.overrides, program)
    return typed


def user_config_dir(argv: Sequence[str]) -> Path | None:
    """Return the folder of --config-dir; UserError where a file has the name of a choice of dsv3."""
    typed = _parser().parse_known_args(_with_values(argv))[0].config_dir
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


def version() -> str:
    """Return what --version prints."""
    packages = ("dsv3", "hydra-core", "torch")
    return ", ".join(f"{name} {importlib.metadata.version(name)}" for name in packages)


def _check_completion(overrides: Sequence[str], program: str) -> None:
    """Raise UserError unless -sc has its one argument; the shell asks with query=, people install."""
    verb, _, shell = overrides[0].partition("=") if len(overrides) == 1 else ("", "", "")
    install = f'eval "$({" ".join(command(program))} -sc install=bash)"'
    if verb not in ("install", "uninstall", "query") or shell not in _SHELLS:
        raise UserError(f"-sc takes install=SHELL or uninstall=SHELL ({', '.join(_SHELLS)}): {install}")
    if verb == "query" and "COMP_LINE" not in os.environ:
        raise UserError(f"-sc query={shell} is for the shell, which asks it at every Tab after {install}")


def _with_values(arguments: Sequence[str]) -> list[str]:
    """Return the arguments with a value for --info, which would take the next override, without --version."""
    completed: list[str] = []
    # At --version argparse would print Hydra's and exit.
    arguments = [argument for argument in arguments if argument != "--version"]
    for argument, following in itertools.zip_longest(arguments, arguments[1:], fillvalue=""):
        bare = argument in ("--info", "-i") and (
            not following or "=" in following or following.startswith("-")
        )
        completed.append("--info=all" if bare else argument)
    return completed


def _parser() -> argparse.ArgumentParser:
    parser = get_args_parser()
    parser.allow_abbrev = False  # or --multi would be read as --multirun by some of those who ask
    parser.error = _refuse_flag  # type: ignore[method-assign]  # it would print a usage of Hydra's and exit
    return parser


def _refuse_flag(message: str) -> NoReturn:
    raise UserError(f"{message} (--help lists what there is)")
