"""The checkpoints in a run directory: their names, and how one appears and disappears as a whole."""

import contextlib
import errno
import json
import math
import os
import re
import shlex
import shutil
from collections.abc import Container
from dataclasses import asdict, dataclass, field
from pathlib import Path

from dsv3.checkpoint.run_statistics import RunStatistics
from dsv3.config.checkpoint import HF_PREFIX
from dsv3.errors import UserError, repository_hint
from dsv3.untrusted_files import BadFile, read_json

MODEL_FILE, STATE_FILE, TOKENIZER_DIR = "model.yaml", "state.json", "tokenizer"

CONFIG_FILE = "config.yaml"
"""The resolved config of a run; written last, it makes a directory a run."""

ENVIRONMENT_FILE = "environment.json"
"""Versions, hardware and the fingerprint of the data of a run."""

MANIFEST_FILE = "manifest.json"

HF_DIR = "hf"
"""In a checkpoint whose weights began as a HuggingFace one: what came beside them."""

ASSETS_DIR = "assets"
"""In a run that began with such weights: the same, from which each of its checkpoints has its copy."""

LATEST, BEST = "latest", "best"
"""Links beside the steps of a run, each to one of them."""

# What file systems without symbolic links answer.
_NO_LINKS = (errno.EPERM, errno.ENOSYS, errno.EOPNOTSUPP)

_STEP = re.compile(r"step-(\d+)", re.ASCII)

_STRAYS_NAMED = 3

_MANIFEST_KEY = "manifest"


@dataclass
class Progress:
    """The progress of a run: all of its state that is not a tensor, stored as JSON."""

    step: int = 0
    samples: int = 0
    """Sequences taken from the data: the position of the data loader."""
    tokens: int = 0
    """Training tokens seen."""
    evaluation_loss: float | None = None
    """Held-out loss after this step; None where it was not evaluated."""
    bookmarks: dict[int, list[int]] = field(default_factory=dict)
    """Of data that streams, the place in each of its lanes from which the next sequences are read."""
    statistics: RunStatistics = field(default_factory=RunStatistics)
    """The memory of bad steps and of the loss; a checkpoint is no good one where they are `in_doubt`."""

    def write(self, directory: Path) -> None:
        """Write state.json, which also says that a manifest was written: a lost one is then noticed."""
        stored = {**asdict(self), _MANIFEST_KEY: MANIFEST_FILE}
        if not self.bookmarks:
            del stored["bookmarks"]
        if self.statistics == RunStatistics():
            del stored["statistics"]
        write_text(directory / STATE_FILE, json.dumps(stored, indent=1) + "\n")

    @classmethod
    def read(cls, directory: Path) -> "Progress":
        """Return the progress stored with a checkpoint; UserError where it is missing or damaged."""
        try:
            stored = read_json(directory / STATE_FILE)
            stored.pop(_MANIFEST_KEY, None)
            loss = stored.pop("evaluation_loss", None)
            statistics = RunStatistics.from_json(stored.pop("statistics", {}))
            bookmarks = {int(lane): list(place) for lane, place in stored.pop("bookmarks", {}).items()}
            if not all(type(count) is int and count >= 0 for count in stored.values()):
                raise ValueError("it holds something else than counts")
            if loss is not None and not (type(loss) in (int, float) and math.isfinite(loss)):
                raise ValueError("its evaluation_loss is no number")
            if not all(type(each) is int and each >= 0 for place in bookmarks.values() for each in place):
                raise ValueError("its bookmarks are no counts")
            return cls(**stored, evaluation_loss=loss, bookmarks=bookmarks, statistics=statistics)
        except (ValueError, TypeError, AttributeError, OverflowError) as error:
            reason = getattr(error, "reason", "") or str(error)[:300]
            raise UserError(f"{directory / STATE_FILE} cannot be read: {reason}") from None


def promises_manifest(directory: Path) -> bool:
    """Return whether state.json says that a manifest was written; older checkpoints have none."""
    with contextlib.suppress(BadFile):
        stored = read_json(directory / STATE_FILE)
        return isinstance(stored, dict) and _MANIFEST_KEY in stored
    return False


def step_directory(run_dir: Path, step: int) -> Path:
    """Return the directory of the checkpoint of `step`; it exists once that is complete."""
    return run_dir / "checkpoints" / f"step-{step}"


def partial_directory(directory: Path) -> Path:
    """Return the directory in which a checkpoint is written before it gets its name."""
    return directory.with_name(f".partial-{directory.name}")


def step_number(checkpoint: Path) -> int:
    """Return the step after which a run's checkpoint was saved, from its name."""
    found = _STEP.fullmatch(checkpoint.name)
    assert found is not None
    return int(found[1])


def complete_steps(run_dir: Path) -> list[Path]:
    """Return the complete checkpoints of a run, oldest first.

    A directory gets its name only when it is complete. One that has lost files is among them: it is damaged,
    and never passed over silently. What is no directory, or an empty one, is none: `stray_steps` has it.
    """
    return [path for path in _named_steps(run_dir) if _holds_files(path)]


def stray_steps(run_dir: Path) -> list[Path]:
    """Return what has the name of a step and has never been one: a file, a pipe, an empty directory."""
    return [path for path in _named_steps(run_dir) if not _holds_files(path)]


def stray_notes(run_dir: Path) -> list[str]:
    """Return a line for the user on the strays of a run, with the command that removes them; else none."""
    strays = stray_steps(run_dir)
    if not strays:
        return []
    names = ", ".join(path.name for path in strays[:_STRAYS_NAMED])
    more = f" and {len(strays) - _STRAYS_NAMED} more" if len(strays) > _STRAYS_NAMED else ""
    return [
        f"passed over in {run_dir / 'checkpoints'}, as no checkpoint is in it: {names}{more}; "
        f"to remove: {shlex.join(['rm', '-r', *map(str, strays[:_STRAYS_NAMED])])}"
    ]


def _named_steps(run_dir: Path) -> list[Path]:
    """Return whatever has the name of a step, in the order of the steps."""
    found = [path for path in (run_dir / "checkpoints").glob("*") if _STEP.fullmatch(path.name)]
    return sorted(found, key=step_number)


def _holds_files(path: Path) -> bool:
    """Return True for a directory that is not empty, or cannot be read: its reader will tell."""
    try:
        with os.scandir(path) as entries:
            return next(entries, None) is not None
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError:
        return True


def newest_checkpoint(run_dir: Path) -> Path | None:
    """Return the checkpoint that `resume=RUN_DIR` continues from: the newest complete one, else None."""
    steps = complete_steps(run_dir)
    return steps[-1] if steps else None


def find_checkpoint(path: str) -> Path:
    """Return the checkpoint directory that `checkpoint.load=PATH` means: a run's newest, or the one given.

    RUN/checkpoints/latest and best are the steps that they point to now.
    """
    if path.startswith(HF_PREFIX):
        named = path.removeprefix(HF_PREFIX)
        released = Path(named).expanduser()
        if not released.exists():
            raise UserError(f"checkpoint.load={path} does not exist{repository_hint(named)}")
        if not is_hf_checkpoint(released):
            ours = (released / ".metadata").is_file() or newest_checkpoint(released)
            why = f"checkpoint.load={shlex.quote(named)} reads it" if ours else "it has no config.json"
            raise UserError(f"checkpoint.load={path} is no HuggingFace checkpoint: {why}")
        return released
    directory = _pointed(Path(path))
    if (directory / ".metadata").is_file():
        return directory
    if newest := newest_checkpoint(directory):
        return newest
    if not directory.exists():
        raise UserError(f"checkpoint.load={path} does not exist{repository_hint(path)}")
    if (directory / "config.json").is_file() or any(directory.glob("*.safetensors")):
        hint = f"checkpoint.load={HF_PREFIX}{shlex.quote(path)}"
        raise UserError(f"checkpoint.load={path} is a HuggingFace checkpoint: {hint} reads it")
    what = "no checkpoint yet" if (directory / CONFIG_FILE).exists() else "neither a run nor a checkpoint"
    raise UserError(f"checkpoint.load={path} holds {what}: give a run, step or DCP directory")


def is_hf_checkpoint(directory: Path) -> bool:
    """Return whether a directory is a HuggingFace checkpoint and none of ours."""
    return (directory / "config.json").is_file() and not (directory / ".metadata").is_file()


def point(run_dir: Path, name: str, step: Path | None) -> None:
    """Make LATEST or BEST a link to a step beside it, without a moment of no link; None removes it.

    A file system without symbolic links gets no pointers: the names of the steps say which is the newest.
    """
    pointer = run_dir / "checkpoints" / name
    if step is None:
        pointer.unlink(missing_ok=True)
        return
    if _pointed(pointer) == step:
        return
    partial = pointer.with_name(f".partial-{name}")
    partial.unlink(missing_ok=True)
    try:
        partial.symlink_to(step.name)
    except OSError as error:
        if error.errno in _NO_LINKS:
            return
        raise
    partial.replace(pointer)
    sync(pointer.parent)


def _pointed(path: Path) -> Path:
    """Return the step that a pointer of a run links to; any other path as it is."""
    if path.name in (LATEST, BEST) and path.is_symlink():
        target = str(path.readlink())
        if _STEP.fullmatch(target):
            return path.with_name(target)
    return path


def prepare_partial(directory: Path) -> Path:
    """Make an empty directory beside `directory`, to write into before `commit`."""
    partial = partial_directory(directory)
    _delete(partial)
    partial.mkdir(parents=True)
    return partial


def commit(partial: Path, directory: Path, synced: Container[str] = ()) -> None:
    """Give a completely written directory its name; a directory of that name is removed.

    `synced` are files, relative to the directory, that whoever wrote them has synced.
    """
    for path in (*partial.rglob("*"), partial):
        if str(path.relative_to(partial)) not in synced:
            sync(path)
    remove(directory)
    partial.rename(directory)
    sync(directory.parent)


def remove(directory: Path) -> None:
    """Remove a checkpoint, or what has its name; a crash half-way leaves nothing that looks complete."""
    if os.path.lexists(directory):
        doomed = directory.with_name(f".removed-{directory.name}")
        _delete(doomed)
        directory.rename(doomed)
        # Files that cannot be deleted now (open ones on NFS, say) are swept later: they must not end a run.
        _delete(doomed)


def _delete(path: Path) -> None:
    """Remove a path, whatever it is, as far as that is possible."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()


def sweep_leftovers(run_dir: Path) -> None:
    """Remove what a crash left half-written or half-removed."""
    for pattern in (".partial-*", ".removed-*"):
        for path in (run_dir / "checkpoints").glob(pattern):
            _delete(path)


def write_text(path: Path, text: str) -> None:
    """Write a file that appears complete or not at all."""
    partial = path.with_name(f".partial-{path.name}")
    try:
        with partial.open("w", encoding="utf-8", errors="surrogateescape") as file:  # names may be no UTF-8
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        partial.rename(path)
    except OSError:
        _delete(partial)
        raise


def sync(path: Path) -> None:
    """Wait until a file's content, or a directory's entries, are on the disk and survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
