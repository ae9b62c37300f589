"""Where a sweep's jobs go, and which of them failed: told by files, since a job may run anywhere."""

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

# Seconds between two looks at whether the sweep that a job belongs to is still there.
_LOOK_EVERY = 1.0


class Sweep:
    """The directory of one sweep and the failures its jobs have left there."""

    def __init__(self) -> None:
        self.directory: Path | None = None
        self._standing: dict[Path, int] = {}

    def choose(self, chosen: str | None) -> str:
        """The directory of the jobs: `chosen` (run.dir) or a new one; failures of earlier are noted."""
        if self.directory is None:
            self.directory = Path(chosen or f"multirun/{time.strftime('%Y-%m-%d_%H-%M-%S')}")
            self._standing = {path: path.stat().st_mtime_ns for path in _marks(self.directory)}
        return str(self.directory)

    def failure(self) -> RunFailed | None:
        """What to tell of the jobs that failed in this sweep, with their first reasons; None if none did."""
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


def same_code(root: Path) -> None:
    """Let the jobs' processes import dsv3 from `root`, as this one does, whatever is installed."""
    others = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    os.environ["PYTHONPATH"] = os.pathsep.join([str(root), *(path for path in others if path != str(root))])


def mark_failed(directory: Path, reason: str, overrides: Sequence[str]) -> None:
    """Leave in a job's directory why it failed and what it was told."""
    directory.mkdir(parents=True, exist_ok=True)
    content = {"reason": reason, "overrides": absolute_paths(overrides)}
    (directory / FAILED_FILE).write_text(json.dumps(content, indent=1) + "\n")


def read_failure(directory: Path) -> tuple[str, list[str]]:
    """Reason and overrides of the failure marked in `directory`; empty where there is none to read."""
    try:
        content: Any = json.loads((directory / FAILED_FILE).read_text())
        return str(content["reason"]), [str(override) for override in content["overrides"]]
    except (OSError, ValueError, KeyError, TypeError):
        return "", []


def end_with_sweep() -> None:
    """Kill this process soon after the sweep that started it is gone, as a process pool would not.

    Only for jobs of hydra/launcher=joblib: what submitit submits is to outlive the command.
    """
    if multiprocessing.get_start_method(allow_none=True) == "loky":
        threading.Thread(target=_follow, args=(os.getppid(),), daemon=True).start()


def _follow(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(_LOOK_EVERY)
    os.kill(os.getpid(), signal.SIGKILL)


def _marks(directory: Path) -> list[Path]:
    """Failure marks by the number of their job."""
    found = directory.glob(f"*/{FAILED_FILE}")
    return sorted(found, key=lambda path: (len(path.parent.name), path.parent.name))
