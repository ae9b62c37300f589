"""Refuse what is typed of Hydra's own node and would do nothing, or harm.

dsv3 makes the run directory, the log and the help itself. Hydra's keys for these are accepted by Hydra, leave
an empty directory at most, and change nothing.
"""

import re
from collections.abc import Sequence

from dsv3.config.overrides import is_multirun
from dsv3.errors import UserError

_SWEEPS = ("hydra/launcher", "hydra.launcher", "hydra/sweeper", "hydra.sweeper")
"""What starts the jobs of a sweep, and what chooses them."""

_ACTS = ("hydra.searchpath", "hydra/callbacks", "hydra.callbacks", "hydra.job.env_set", "hydra.job.env_copy")
"""What Hydra does in any job: find files of config, call back, set variables of the environment."""

_LOGS = (
    "Hydra logs nothing here; log.txt has the lines of the console, and HYDRA_FULL_ERROR=1 shows tracebacks"
)

_INSTEAD = {
    "hydra.run": "{place}",
    "hydra.sweep.dir": "run.dir=DIR says where a sweep's jobs go",
    "hydra.sweep": "the jobs of a sweep are numbered in its directory, run.dir=DIR",
    "hydra.mode": "-m makes a sweep of a command",
    "hydra.output_subdir": "{place}, with config.yaml and overrides.yaml",
    "hydra/output": "{place}, with config.yaml and overrides.yaml",
    "hydra.job.chdir": "a command stays where it is typed; {place}",
    "hydra.job.name": "run.dir=DIR names a run, logger.name=NAME its name in wandb",
    "hydra.job.id": "Hydra counts the jobs of a sweep itself",
    "hydra.job.num": "Hydra counts the jobs of a sweep itself",
    "hydra.verbose": _LOGS,
    "hydra.job_logging": _LOGS,
    "hydra/job_logging": _LOGS,
    "hydra.hydra_logging": _LOGS,
    "hydra/hydra_logging": _LOGS,
    "hydra.help": "--help shows dsv3's own text",
    "hydra/help": "--help shows dsv3's own text",
    "hydra.hydra_help": "--help shows dsv3's own text",
    "hydra/hydra_help": "--help shows dsv3's own text",
    "hydra.overrides": "the arguments of the command are the overrides",
}
"""What does the thing here, by the beginning of a key that Hydra would accept."""

_PLACE = {
    "train": "run.dir=DIR says where a run goes",
    "convert": "output=DIR says where the output goes",
}


def refuse_hydra_overrides(argv: Sequence[str], program: str) -> None:
    """Raise UserError for a typed key of Hydra's node that would not act in `program` (train or convert)."""
    for argument in argv:
        key = argument.lstrip("+~").partition("=")[0]
        named = "=" in argument or argument.startswith("~")  # or it is the value of a flag, --cfg hydra
        if argument.startswith("-") or not named or re.split(r"[./@]", key)[0] != "hydra":
            continue
        of_sweeps = _begins(key, _SWEEPS)
        if of_sweeps and program != "train":
            raise UserError(f"{key} is for sweeps, and {program}.py has none: leave it out")
        if of_sweeps and not is_multirun(argv):
            raise UserError(f"{key} counts in a sweep alone: add -m, or leave it out")
        if of_sweeps or _begins(key, _ACTS):
            continue
        instead = next((text for known, text in _INSTEAD.items() if _begins(key, [known])), None)
        if instead is None:
            acting = ", ".join([*_SWEEPS, *_ACTS])
            raise UserError(f"{key} cannot be set: of Hydra's own keys these act: {acting}")
        raise UserError(f"{key} cannot be set directly: {instead.format(place=_PLACE[program])}")


def _begins(key: str, known: Sequence[str]) -> bool:
    """Return True where `key` is one of `known` or lies below one."""
    return any(re.match(rf"{re.escape(name)}(?![\w-])", key) for name in known)
