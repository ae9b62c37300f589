"""A sweep: its directory, its jobs and what they left, in files because a job may run anywhere."""

import contextlib
import json
import math
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Glob, Override

from dsv3.checkpoint.directory import CONFIG_FILE
from dsv3.config.overrides import absolute_paths
from dsv3.config.registry import config_groups
from dsv3.distributed.directory_lock import DirectoryLock
from dsv3.errors import RunFailed, UserError
from dsv3.launch.job import SweepJob
from dsv3.launch.run_dir import make_new_dir, require_unused
from dsv3.untrusted_files import BadFile, read_json

FAILED_FILE, RESULT_FILE = "failed.json", "result.json"

_SHOWN = 5

# Seconds between two checks of a job that its sweep still runs.
_LOOK_EVERY = 1.0


@dataclass
class Sweep:
    """The jobs of one command under -m; it travels to the processes of the jobs."""

    directory: Path | None = None
    arguments: list[str] = field(default_factory=list)
    """The command's, as Hydra takes them; none where no sweep starts."""
    first: int = 0
    """Number of the first job: a search that goes on keeps the directories of its earlier trials."""
    finished: int = 0
    """Trials that earlier commands have finished."""
    begun: SweepJob | None = None
    """The newest job that this process has begun."""
    standing: dict[Path, int] = field(default_factory=dict)
    """Files of earlier sweeps in the directory, and when they were written."""
    lock: DirectoryLock | None = None
    refused: UserError | None = None
    """Another sweep owns the directory."""

    def choose(self, chosen: str | None) -> str:
        """Return the directory of the jobs, `chosen` (run.dir) or a new one; note what is there."""
        if self.directory is None:
            self.directory = Path(chosen or f"multirun/{time.strftime('%Y-%m-%d_%H-%M-%S')}")
            if self.arguments and not chosen:
                with contextlib.suppress(OSError):  # Hydra fails on the same directory next, and is explained
                    self.directory = make_new_dir(self.directory)
                    self.lock = DirectoryLock(self.directory, f"run.dir={self.directory}")
                    self.lock.made = [self.directory, self.directory.parent]
            if self.arguments:
                self._take()
            files = [path for name in (FAILED_FILE, RESULT_FILE) for path in self._files(name)]
            self.standing = {path: path.stat().st_mtime_ns for path in files}
        return str(self.directory)

    def _take(self) -> None:
        """Own the directory until the sweep has ended: its jobs and its search are written there."""
        assert self.directory is not None
        try:
            if (self.directory / CONFIG_FILE).exists():
                raise UserError(
                    f"run.dir={self.directory} holds a run, and a sweep makes a directory with one per job: "
                    "name another"
                )
            require_unused(self.directory)
            self.lock = self.lock or DirectoryLock(self.directory, f"run.dir={self.directory}")
            with contextlib.suppress(OSError):
                self.lock.take()
        except UserError as error:  # Hydra is about to wrap it
            self.refused = error
            raise

    def close(self) -> None:
        """Give the directory back."""
        if self.lock is not None:
            self.lock.release()
            self.lock = None

    def number(self, counted: int) -> int:
        """Return the number of the job that Hydra counts as `counted`, from 0."""
        return self.first + counted

    def job(
        self, counted: int, overrides: Sequence[str], sweeper: Mapping[str, Any], directory: Path
    ) -> SweepJob:
        """Return the place of a job, by Hydra's count, its overrides, the sweeper and the job's directory."""
        # As in Hydra's sweepers: what is typed takes the place of what an experiment sweeps.
        arguments = [*searched_arguments(sweeper), *self.arguments]
        swept, constant = split_arguments(arguments)
        counts = [number_of_choices(override) for override in swept.values()]
        trials, known = sweeper.get("n_trials"), [count for count in counts if count is not None]
        total = math.prod(known) if sweeper["_target_"].endswith("BasicSweeper") else None
        if trials is not None:
            total = self.finished + trials
        typed = [override for override in overrides if override.partition("=")[0].lstrip("+") not in constant]
        place = self.finished + counted + 1
        self.begun = SweepJob(directory.name, place, total, typed, Path(self.directory or directory.parent))
        return self.begun

    def not_run(self) -> list[str]:
        """Return the names of the jobs that have not begun, where their number is known."""
        if self.begun is None or self.begun.total is None:
            return []
        first = self.first - self.finished
        return [str(first + place) for place in range(self.begun.place, self.begun.total)]

    def failure(self) -> RunFailed | None:
        """Return the jobs that failed in this sweep with their first reasons; None if none failed."""
        new = [path for path, _ in self.left(FAILED_FILE)]
        if not new:
            return None
        lines = [f"job {path.parent.name}: {read_failure(path.parent)[0]}" for path in new[:_SHOWN]]
        if len(new) > _SHOWN:
            lines.append(f"and {len(new) - _SHOWN} more: {FAILED_FILE} in each tells why")
        jobs = "job" if len(new) == 1 else "jobs"
        names = ", ".join(path.parent.name for path in new)
        return RunFailed("\n".join([f"{jobs} {names} of {self.directory}; the others went on", *lines]))

    def left(self, name: str) -> Iterator[tuple[Path, dict[str, Any]]]:
        """Yield the files of a name that the jobs of this sweep have written, with their contents."""
        for path in self._files(name):
            if self.standing.get(path) != path.stat().st_mtime_ns:
                yield path, _read_json(path)

    def _files(self, name: str) -> list[Path]:
        """Return the files of a name in the order of their jobs' numbers."""
        found = self.directory.glob(f"*/{name}") if self.directory else ()
        return sorted(found, key=lambda path: (len(path.parent.name), path.parent.name))


def searched_arguments(sweeper: Mapping[str, Any]) -> list[str]:
    """Return the overrides of a sweeper's own `params`."""
    return [f"{key}={value}" for key, value in (sweeper.get("params") or {}).items()]


def split_arguments(arguments: Sequence[str]) -> tuple[dict[str, Override], set[str]]:
    """Return the swept keys of a command with their overrides, and those of one value; the last counts."""
    parser, swept, constant = OverridesParser.create(), {}, set[str]()
    for argument in arguments:
        if not argument.startswith("-"):
            override = parser.parse_override(argument)
            key = override.key_or_group
            if override.is_sweep_override():
                swept[key] = override
                constant.discard(key)
            else:
                swept.pop(key, None)
                constant.add(key)
    return swept, constant


def number_of_choices(override: Override) -> int | None:
    """Return the number of values of a swept override; None for an interval."""
    value: Any = override.value()
    if isinstance(value, Glob):
        return len(value.filter(config_groups().get(override.key_or_group, [])))
    return sum(1 for _ in override.sweep_string_iterator()) if override.is_discrete_sweep() else None


def in_parallel_job() -> bool:
    """Return True in a process of joblib's pool, which hydra/launcher=joblib starts jobs in."""
    return multiprocessing.get_start_method(allow_none=True) == "loky"


def share_source_with_jobs(root: Path) -> None:
    """Let the jobs' processes import dsv3 from `root`, as this one does, whatever is installed."""
    others = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    os.environ["PYTHONPATH"] = os.pathsep.join([str(root), *(path for path in others if path != str(root))])


def mark_failed(
    directory: Path, reason: str, overrides: Sequence[str], more: Mapping[str, Any] | None = None
) -> None:
    """Record in a job's directory the reason of its failure, its overrides, and `more` for the report."""
    content = {"reason": reason, "overrides": absolute_paths(overrides), **(more or {})}
    _write_json(directory / FAILED_FILE, content)


def record_result(directory: Path, content: Mapping[str, Any]) -> None:
    """Add to what a job's directory records for the report at the end of the sweep."""
    _write_json(directory / RESULT_FILE, _read_json(directory / RESULT_FILE) | dict(content))


def read_failure(directory: Path) -> tuple[str, list[str]]:
    """Return reason and overrides of the failure recorded in `directory`; empty where there is none."""
    try:
        content = _read_json(directory / FAILED_FILE)
        return str(content["reason"]), [str(override) for override in content["overrides"]]
    except (KeyError, TypeError):
        return "", []


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n")


def _read_json(path: Path) -> dict[str, Any]:
    """Return the object in a file; an empty one where it is missing or damaged."""
    try:
        content = read_json(path)
    except BadFile:
        return {}
    return content if isinstance(content, dict) else {}


def die_with_sweep() -> None:
    """Kill this process soon after the sweep that started it is gone, as a process pool does not.

    For jobs of hydra/launcher=joblib only: what submitit submits is to outlive the command.
    """
    if in_parallel_job():
        threading.Thread(target=_follow, args=(os.getppid(),), daemon=True).start()


def _follow(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(_LOOK_EVERY)
    os.kill(os.getpid(), signal.SIGKILL)
