"""Worker side: compare the replicas of a model that trains, and flip bits of every kind of its state."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dsv3.checkpoint.directory import Progress, complete_steps
from dsv3.checkpoint.manager import CheckpointManager
from dsv3.checkpoint.replicas import ReplicaGroup, Replicas, replica_groups
from dsv3.checkpoint.state import local_tensor
from dsv3.config.checkpoint import CheckpointConfig
from dsv3.config.root import Config
from dsv3.errors import RunFailed
from dsv3.planning.layout import ParallelDims
from dsv3.training.step import TrainStep
from tests.parallel.tiny_training import GLOBAL_BATCH, prepared, take_step

BIT = 9
"""The bit that is flipped."""


class Flip(NamedTuple):
    """What was changed on one rank, and what the comparison said."""

    name: str
    kind: str
    """The last part of the name; `lr` of an optimizer's settings."""
    is_tensor: bool
    told: str


def compare_while_training(
    config: Config, degrees: ParallelDims, microbatch: int, optimizer: str, steps: int
) -> list[str]:
    """Train so many steps and compare after each; return the names of all that was compared."""
    setup = prepared(config, degrees, optimizer)
    if setup is None:
        return []
    model, chosen, ranks = setup
    step = TrainStep(model.forward_backward, chosen, ranks, clip_norm=1.0)
    replicas, names = Replicas(ranks, Path("RUN")), set()
    for number in range(steps):
        take_step(step, number, microbatch, optimizer)
        progress = Progress(number + 1, (number + 1) * GLOBAL_BATCH)
        names |= {
            name for group in replica_groups(model.model_parts, chosen, progress) for name in group.tensors
        }
        replicas.compare(model.model_parts, chosen, progress)
    return sorted(names)


def flip_bits(
    config: Config, degrees: ParallelDims, microbatch: int, optimizer: str, victim: int
) -> list[Flip]:
    """Flip a bit of one tensor of every kind on rank `victim`, one after another; the same on all ranks."""
    setup = prepared(config, degrees, optimizer)
    if setup is None:
        return []
    model, chosen, ranks = setup
    step = TrainStep(model.forward_backward, chosen, ranks, clip_norm=1.0)
    for number in range(2):
        take_step(step, number, microbatch, optimizer)
    progress, told = Progress(2, 2 * GLOBAL_BATCH), list[Flip]()

    def compare() -> str:
        try:
            Replicas(ranks, Path("RUN")).compare(model.model_parts, chosen, progress)
        except RunFailed as error:
            return str(error)
        return ""

    groups = replica_groups(model.model_parts, chosen, progress)
    chosen_names = ranks.broadcast_object(_one_of_each_kind(groups), victim)
    for slot, name in chosen_names:
        undo = _flip(progress, chosen, name, groups[slot].tensors[name]) if ranks.rank == victim else None
        of_settings = name.startswith("optimizer.settings.")
        kind = "lr" if of_settings else name.rpartition(".")[2]
        told.append(Flip(name, kind, not of_settings and not name.startswith("progress."), compare()))
        if undo is not None:
            undo()
    assert compare() == ""
    return told


def refuse_to_save(
    config: Config, degrees: ParallelDims, microbatch: int, folder: Path
) -> tuple[tuple[str, ...], str]:
    """Save a step, flip a bit on rank 2 and save the next; return what is there, and the error."""
    setup = prepared(config, degrees, "sgd")
    if setup is None:
        return (), ""
    model, optimizer, ranks = setup
    manager, told = CheckpointManager(folder, CheckpointConfig(async_save=False), ranks), ""
    manager.save(model.model_parts, optimizer, Progress(1, GLOBAL_BATCH))
    if ranks.rank == 2:
        _flip(Progress(), optimizer, "", model.model_parts[0].embedding.weight)
    try:
        manager.save(model.model_parts, optimizer, Progress(2, 2 * GLOBAL_BATCH))
    except RunFailed as error:
        told = str(error)
    ranks.meet()
    return tuple(path.name for path in complete_steps(folder)), told


def _one_of_each_kind(groups: list[ReplicaGroup]) -> list[tuple[int, str]]:
    """Return group and name of a tensor with elements of each kind and type in each group."""
    kinds: dict[Any, tuple[int, str]] = {}
    for slot, group in enumerate(groups):
        for name, tensor in group.tensors.items():
            if local_tensor(tensor).numel():
                kinds.setdefault((slot, name.rpartition(".")[2], tensor.dtype), (slot, name))
    return list(kinds.values())


def _flip(
    progress: Progress, optimizer: torch.optim.Optimizer, name: str, tensor: Tensor
) -> Callable[[], None]:
    """Flip a bit of the last element, or change what is no tensor; return what undoes it."""
    if name.startswith("progress."):
        field = name.rpartition(".")[2]
        before = getattr(progress, field)
        setattr(progress, field, before ^ 1 if isinstance(before, int) else 1.0)
        return lambda: setattr(progress, field, before)
    if name.startswith("optimizer.settings."):
        group = optimizer.param_groups[0]
        rate = group["lr"]
        group["lr"] = 2 * rate
        return lambda: group.update(lr=rate)
    local = local_tensor(tensor).detach()
    bits = local.view(-1).view({2: torch.int16, 4: torch.int32}[local.element_size()])

    def flip() -> None:
        bits[-1] ^= 1 << BIT

    flip()
    return flip
