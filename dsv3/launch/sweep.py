"""A sweep's directory and failed jobs, recorded in files because a job may run anywhere."""

import json
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dsv3.config.overrides import absolute_paths
from dsv3.errors import RunFailed

FAILED_FILE = "failed.json"

_SHOWN = 5

# Seconds between two checks of a job that its sweep still runs.
_LOOK_EVERY = 1.0


class Sweep:
    """The directory of one sweep, and the failures that its jobs have recorded there."""

    def __init__(self) -> None:
        self.directory: Path | None = None
        self._standing: dict[Path, int] = {}

    def choose(self, chosen: str | None) -> str:
        """Return the directory of the jobs, `chosen` (run.dir) or a new one; note earlier failures."""
        if self.directory is None:
            self.directory = Path(chosen or f"multirun/{time.strftime('%Y-%m-%d_%H-%M-%S')}")
            self._standing = {path: path.stat().st_mtime_ns for path in _marks(self.directory)}
        return str(self.directory)

    def failure(self) -> RunFailed | None:
        """Return the jobs that failed in this sweep with their first reasons; None if none failed."""
        if self.directory is None:
            return None
        new = [p for p in _marks(self.directory) if self._standing.get(p) != p.stat().st_mtime_ns]
        if not new:
            return None
        lines = [f"job {path.parent.name}: {read_failure(path.parent)[0]}" for path in new[:_SHOWN]]
        if len(new) > _SHOWN:
            lines.append(f"and {len(new) - _SHOWN} more: {FAILED_FILE} in each tells why")
        jobs = "job" if len(new) == 1 else "jobs"
        names = ", ".join(path.parent.name for path in new)
        return RunFailed("\n".join([f"{jobs} {names} of {self.directory}; the others went on", *lines]))


def share_source_with_jobs(root: Path) -> None:
    """Let the jobs' processes import dsv3 from `root`, as this one does, whatever is installed."""
    others = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    os.environ["PYTHONPATH"] = os.pathsep.join([str(root), *(path for path in others if path != str(root))])


def mark_failed(directory: Path, reason: str, overrides: Sequence[str]) -> None:
    """Record in a job's directory the reason of its failure and its overrides."""
    directory.mkdir(parents=True, exist_ok=True)
    content = {"reason": reason, "overrides": absolute_paths(overrides)}
    (directory / FAILED_FILE).write_text(json.dumps(content, indent=1) + "\n")


def read_failure(directory: Path) -> tuple[str, list[str]]:
    """Return reason and overrides of the failure recorded in `directory`; empty where there is none."""
    try:
        content: Any = json.loads((directory / FAILED_FILE).read_text())
        return str(content["reason"]), [str(override) for override in content["overrides"]]
    except (OSError, ValueError, KeyError, TypeError):
        return "", []


def die_with_sweep() -> None:
    """Kill this process soon after the sweep that started it is gone, as a process pool does not.

    For jobs of hydra/launcher=joblib only: what submitit submits is to outlive the command.
    """
    if multiprocessing.get_start_method(allow_none=True) == "loky":
        threading.Thread(target=_follow, args=(os.getppid(),), daemon=True).start()


def _follow(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(_LOOK_EVERY)
    os.kill(os.getpid(), signal.SIGKILL)


def _marks(directory: Path) -> list[Path]:
    """Return the failure files in the order of their jobs' numbers."""
    found = directory.glob(f"*/{FAILED_FILE}")
    return sorted(found, key=lambda path: (len(path.parent.name), path.parent.name))
