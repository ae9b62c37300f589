"""Where checkpoints lie in a run directory, and how one appears and disappears whole."""

import contextlib
import json
import math
import os
import re
import shlex
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

from dsv3.config.checkpoint import HF_PREFIX
from dsv3.errors import UserError

"""What `checkpoint.load` begins with where the path behind it is a HuggingFace checkpoint."""

MODEL_FILE, STATE_FILE, TOKENIZER_DIR = "model.yaml", "state.json", "tokenizer"

MANIFEST_FILE = "manifest.json"

LATEST, BEST = "latest", "best"
"""What stands beside the steps of a run and points to one of them."""

_STEP = re.compile(r"step-(\d+)")

_PROMISE = "manifest"


@dataclass
class Progress:
    """How far a run had come; everything of its state that is not a tensor, kept as JSON."""

    step: int = 0
    samples: int = 0
    """Sequences taken from the data: the position of the loader."""
    tokens: int = 0
    """Training tokens seen."""
    evaluation_loss: float | None = None
    """The held-out loss after this very step; None where it was not evaluated."""

    def write(self, directory: Path) -> None:
        """Store as state.json, which tells too that a manifest belongs to it: its loss is then noticed."""
        stored = {**asdict(self), _PROMISE: MANIFEST_FILE}
        write_text(directory / STATE_FILE, json.dumps(stored, indent=1) + "\n")

    @classmethod
    def read(cls, directory: Path) -> "Progress":
        """The progress stored with a checkpoint; UserError where it is missing or damaged."""
        try:
            stored = json.loads((directory / STATE_FILE).read_text())
            stored.pop(_PROMISE, None)
            loss = stored.pop("evaluation_loss", None)
            if not all(type(count) is int and count >= 0 for count in stored.values()):
                raise ValueError("it holds something else than counts")
            if loss is not None and not (type(loss) in (int, float) and math.isfinite(loss)):
                raise ValueError("its evaluation_loss is no number")
            return cls(**stored, evaluation_loss=loss)
        except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
            raise UserError(f"{directory / STATE_FILE} cannot be read: {error}") from None


def promises_manifest(directory: Path) -> bool:
    """Whether state.json says that a manifest was written; older checkpoints have none."""
    with contextlib.suppress(OSError, ValueError, RecursionError):
        stored = json.loads((directory / STATE_FILE).read_text())
        return isinstance(stored, dict) and _PROMISE in stored
    return False


def step_directory(run_dir: Path, step: int) -> Path:
    """Where the checkpoint of `step` lies once it is complete."""
    return run_dir / "checkpoints" / f"step-{step}"


def partial_directory(directory: Path) -> Path:
    """Where a checkpoint is written before it gets its name."""
    return directory.with_name(f".partial-{directory.name}")


def step_number(checkpoint: Path) -> int:
    """The step after which a run's checkpoint was saved, from its name."""
    found = _STEP.fullmatch(checkpoint.name)
    assert found is not None
    return int(found[1])


def complete_steps(run_dir: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first: a directory has its name only when whole."""
    found = [path for path in (run_dir / "checkpoints").glob("*") if _STEP.fullmatch(path.name)]
    return sorted(found, key=step_number)


def find_checkpoint(path: str) -> Path:
    """The checkpoint directory that `checkpoint.load=PATH` means: a run's newest, or the one given.

    RUN/checkpoints/latest and best are the steps that they point to now.
    """
    if path.startswith(HF_PREFIX):
        released = Path(path.removeprefix(HF_PREFIX))
        if not is_released(released):
            raise UserError(f"checkpoint.load={path} is no HuggingFace checkpoint: it has no config.json")
        return released
    directory = _pointed(Path(path))
    if (directory / ".metadata").is_file():
        return directory
    steps = complete_steps(directory)
    if steps:
        return steps[-1]
    if not directory.exists():
        raise UserError(f"checkpoint.load={path} does not exist")
    if (directory / "config.json").is_file() or any(directory.glob("*.safetensors")):
        hint = f"checkpoint.load={HF_PREFIX}{shlex.quote(path)}"
        raise UserError(f"checkpoint.load={path} is a HuggingFace checkpoint: {hint} reads it")
    what = "no checkpoint yet" if (directory / "config.yaml").exists() else "neither a run nor a checkpoint"
    raise UserError(f"checkpoint.load={path} holds {what}: give a run, step or DCP directory")


def is_released(directory: Path) -> bool:
    """Whether a directory is a HuggingFace checkpoint and none of ours."""
    return (directory / "config.json").is_file() and not (directory / ".metadata").is_file()


def point(run_dir: Path, name: str, step: Path | None) -> None:
    """Let LATEST or BEST be a link to a step beside it, and never none in between; None takes it away.

    Where the file system has no links it is a text file with the name of the step.
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
    except OSError:
        write_text(pointer, step.name + "\n")
        return
    partial.replace(pointer)
    sync(pointer.parent)


def _pointed(path: Path) -> Path:
    """The step that a pointer of a run means; any other path as it is."""
    if path.name not in (LATEST, BEST):
        return path
    target = ""
    with contextlib.suppress(OSError, ValueError):
        target = str(path.readlink()) if path.is_symlink() else path.read_text().strip()
    return path.with_name(target) if _STEP.fullmatch(target) else path


def prepare_partial(directory: Path) -> Path:
    """An empty directory beside `directory` to write into before `commit`."""
    partial = partial_directory(directory)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    return partial


def commit(partial: Path, directory: Path) -> None:
    """Give a completely written directory its name; what stood there goes."""
    for path in (*partial.rglob("*"), partial):
        sync(path)
    remove(directory)
    partial.rename(directory)
    sync(directory.parent)


def remove(directory: Path) -> None:
    """Take a checkpoint away such that a crash half-way leaves nothing that looks complete."""
    if directory.exists():
        doomed = directory.with_name(f".removed-{directory.name}")
        shutil.rmtree(doomed, ignore_errors=True)
        directory.rename(doomed)
        # What cannot be deleted now (an open file on NFS, say) is swept later: no reason to end a run.
        shutil.rmtree(doomed, ignore_errors=True)


def sweep_leftovers(run_dir: Path) -> None:
    """Clear what a crash left half-written or half-removed."""
    for pattern in (".partial-*", ".removed-*"):
        for path in (run_dir / "checkpoints").glob(pattern):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a file so that it is there whole or not at all."""
    partial = path.with_name(f".partial-{path.name}")
    with partial.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.rename(path)


def sync(path: Path) -> None:
    """Make a file's content, or a directory's entries, last through a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
