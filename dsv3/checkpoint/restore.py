"""Restore the state of training from one checkpoint of a run: model, optimizer, random state and progress.

Nothing is written and no directory is swept, so that task=replay reads a run that goes on by the same code
as a resume.
"""

from collections.abc import Collection
from pathlib import Path

import torch
from torch import Tensor

from dsv3.checkpoint.agreement import together
from dsv3.checkpoint.dcp_metadata import load_tensors, read_metadata
from dsv3.checkpoint.directory import Progress
from dsv3.checkpoint.load import fill
from dsv3.checkpoint.state import (
    ModelParts,
    NewState,
    make_optimizer_state,
    missing_state,
    model_state,
    optimizer_state,
    random_state,
)
from dsv3.distributed.process_group import RankContext
from dsv3.errors import UserError
from dsv3.metrics.progress import phase


def restore_training(
    directory: Path, model_parts: ModelParts, optimizer: torch.optim.Optimizer, ranks: RankContext
) -> tuple[Progress, list[str]]:
    """Load a verified checkpoint into model and optimizer; all ranks call this together.

    Return the progress of the run at it, and lines on what the user should know of the restore. UserError, on
    all ranks alike, for state that the checkpoint lacks.
    """
    metadata = read_metadata(directory)
    stored = metadata.state_dict_metadata
    new = NewState(model_parts, optimizer, stored)
    with phase("making room for the optimizer's state"):
        make_optimizer_state(optimizer)
    notes = _start_state(new, directory, ranks)
    state = [item for item in optimizer_state(model_parts, optimizer) if item[0] not in new]
    _require_state(state, stored, directory, ranks)
    # A layout with more ranks than before has no stored random state for the new ones.
    random = {name: value for name, value in random_state(ranks.rank).items() if name in stored}
    wanted = [*model_state(model_parts), *state, *random.items()]

    def read() -> None:
        fill(directory, wanted, lambda tensors: load_tensors(directory, tensors, metadata))

    together(ranks, read)
    for generator in random.values():
        torch.set_rng_state(generator)
    return Progress.read(directory), notes


def _start_state(new: NewState, directory: Path, ranks: RankContext) -> list[str]:
    """Begin the state that the checkpoint does not have; return a line that says so."""
    names = sorted({name for names in ranks.all_gather_object(new.begin()) for name in names})
    if not names:
        return []
    shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
    return [f"{directory.name} has no optimizer state of {len(names)} parameters, it begins anew: {shown}"]


def _require_state(
    state: list[tuple[str, Tensor]], stored: Collection[str], directory: Path, ranks: RankContext
) -> None:
    """Raise UserError on all ranks where another optimizer has left other state."""
    missing = ranks.all_gather_object(missing_state((name for name, _ in state), stored))
    kinds = sorted({kind for kinds in missing for kind in kinds})
    if kinds:
        raise UserError(
            f"{directory} was saved by another optimizer: it has no {', '.join(kinds)}\n"
            "resume with the run's own optimizer, or start a new run: "
            f"checkpoint.load={directory.parent.parent}"
        )
