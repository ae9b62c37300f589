"""Choose the checkpoints of a run that stay, and the steps that `latest` and `best` point to."""

from collections.abc import Sequence
from pathlib import Path

from dsv3.checkpoint.directory import (
    BEST,
    LATEST,
    STATE_FILE,
    Progress,
    complete_steps,
    point,
    remove,
    step_directory,
    step_number,
)
from dsv3.config.checkpoint import CheckpointConfig
from dsv3.errors import UserError


def prune(run_dir: Path, config: CheckpointConfig) -> None:
    """Remove the checkpoints that need not stay, after the pointers: none of them ever leads nowhere."""
    update_pointers(run_dir, config)
    steps = complete_steps(run_dir)
    stay = kept(steps, config)
    for step in steps:
        if step not in stay:
            remove(step)


def update_pointers(run_dir: Path, config: CheckpointConfig) -> None:
    """Point `latest` and, with keep_best, `best` to their steps; remove a pointer without a step."""
    for name in (LATEST, BEST):
        pointer = run_dir / "checkpoints" / name
        if pointer.is_dir() and not pointer.is_symlink():
            # A copy of the run followed the link and made a directory of it: give it the name of its step.
            step = step_directory(run_dir, Progress.read(pointer).step)
            if step in complete_steps(run_dir):
                remove(pointer)
            else:
                remove(step)
                pointer.rename(step)
    steps = complete_steps(run_dir)
    point(run_dir, LATEST, steps[-1] if steps else None)
    point(run_dir, BEST, best_step(steps) if config.keep_best else None)


def kept(steps: Sequence[Path], config: CheckpointConfig) -> set[Path]:
    """Return those of `steps`, oldest first, that stay: the last, the last good, every Mth and the best."""
    stay = set(steps[-config.keep_last :])
    if (good := last_good(steps)) is not None:
        stay |= {good}
    if config.keep_every is not None:
        stay |= {step for step in steps if step_number(step) % config.keep_every == 0}
    if config.keep_best and (best := best_step(steps)) is not None:
        stay.add(best)
    return stay


def best_step(steps: Sequence[Path]) -> Path | None:
    """Return the step with the lowest held-out loss, the earlier of equals; None where none was evaluated.

    A checkpoint carries the loss of its own step only, so one between two evaluations is never the best. One
    that was saved while the loss was above its past is not the best either.
    """
    losses = [(loss, step) for step in steps if (loss := _loss(step)) is not None]
    return min(losses, key=lambda pair: pair[0])[1] if losses else None


def last_good(steps: Sequence[Path], before: int | None = None) -> Path | None:
    """Return the newest of `steps`, oldest first, that was not saved while the loss was above its past.

    With `before`, of those of earlier steps than that one. None where there is none.
    """
    earlier = [step for step in steps if before is None or step_number(step) < before]
    return next((step for step in reversed(earlier) if _is_good(step)), None)


def doubt_notes(step: Path) -> list[str]:
    """Return a line for the user of a checkpoint that was saved while the loss was above its past; else none.

    A converted checkpoint, and one of another tool, has no past.
    """
    if not (step / STATE_FILE).is_file() or _is_good(step):
        return []
    steps = complete_steps(step.parent.parent)
    good = last_good(steps)
    better = "" if good is None else f"; {good} is the last good one"
    return [f"{step} was saved while its loss was above its past (docs/reliability.md, bad numbers){better}"]


def _loss(step: Path) -> float | None:
    """Return the held-out loss of a good checkpoint; None where it was not evaluated, or is damaged."""
    try:
        progress = Progress.read(step)
    except UserError:  # a damaged old checkpoint must not end a run
        return None
    return None if progress.statistics.in_doubt else progress.evaluation_loss


def _is_good(step: Path) -> bool:
    try:
        return not Progress.read(step).statistics.in_doubt
    except UserError:
        return False
