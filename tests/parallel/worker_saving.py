"""Worker side: asynchronous saves on any layout, while the model trains on."""

from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist

from dsv3.checkpoint import save
from dsv3.checkpoint.directory import Progress
from dsv3.checkpoint.manager import CheckpointManager
from dsv3.checkpoint.manifest import verify_together
from dsv3.config.checkpoint import CheckpointConfig
from dsv3.config.root import Config
from dsv3.distributed.process_group import RankContext
from dsv3.errors import RunFailed, UserError
from dsv3.planning.layout import ParallelDims
from dsv3.training.step import TrainStep
from tests.parallel.tiny_training import prepared, take_step


def save_while_training(
    config: Config, degrees: ParallelDims, microbatch: int, folder: Path
) -> tuple[bool, str]:
    """Save one step synchronously and asynchronously, and train on before the second save is written.

    Then make a save fail on rank 3 alone. Return True if steps went on meanwhile, and the error here.
    """
    setup = prepared(config, degrees, "adamw")
    assert setup is not None
    model, optimizer, ranks = setup
    step = TrainStep(model.forward_backward, optimizer, ranks, clip_norm=1e9)
    managers = [
        CheckpointManager(folder / name, CheckpointConfig(async_save=name == "aside"), ranks)
        for name in ("once", "aside")
    ]
    take_step(step, 0, microbatch, "adamw")
    write, store, went_on = save.save_tensors, dist.distributed_c10d._get_default_store(), []

    def held(*arguments: Any) -> None:
        store.wait([f"{folder}/go"])
        went_on.append(1)
        write(*arguments)

    managers[0].save(model.model_parts, optimizer, Progress(1))
    with patch.object(save, "save_tensors", held):
        managers[1].save(model.model_parts, optimizer, Progress(1))
        for number in (1, 2):
            take_step(step, number, microbatch, "adamw")
        free = not went_on
        ranks.meet()
        store.set(f"{folder}/go", "")
        take_step(step, 3, microbatch, "adamw")  # while it is written: collectives of both at once
        managers[1].wait()
    return free, _fail_on_one(managers[1], model.model_parts, optimizer, ranks.rank)


def _fail_on_one(manager: CheckpointManager, parts: Any, optimizer: Any, rank: int) -> str:
    entries = save._entries

    def full(*arguments: Any, **keywords: Any) -> Any:
        if rank == 3:
            raise OSError(28, "No space left on device", "a file of rank 3")
        return entries(*arguments, **keywords)

    with patch.object(save, "_entries", full):
        try:
            manager.save(parts, optimizer, Progress(4))
            manager.wait()
        except RunFailed as error:
            return str(error)
    return "saved"


def verify_here(directory: Path, world: int) -> str:
    """Verify a checkpoint on all ranks together; return the error that this rank raises, or ""."""
    rank = dist.get_rank()
    try:
        verify_together(directory, RankContext(rank, rank, world, torch.device("cpu")))
    except UserError as error:
        return str(error)
    return ""
