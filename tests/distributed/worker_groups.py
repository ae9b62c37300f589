"""Worker side: the process groups of layouts and their timeouts, and a stop that all ranks agree on."""

from contextlib import ExitStack
from dataclasses import replace
from datetime import timedelta
from typing import Any, cast

import torch
import torch.distributed as dist

from dsv3.config.root import Config
from dsv3.distributed.meeting import Meeting
from dsv3.distributed.process_group import PATIENT, RankContext
from dsv3.distributed.signals import StopEarly, StopRequest, StopSignal, obey
from dsv3.distributed.torch_private import connect_to_store, group_timeouts, set_group_timeouts
from dsv3.distributed.watchdog import Watchdog
from dsv3.parallel.mesh import ParallelMesh
from dsv3.planning.layout import ParallelDims
from dsv3.training.evaluation import evaluate
from dsv3.training.step import TrainStep
from tests.parallel.tiny_training import StepRows, prepared, take_step

TIMEOUT = 1234.0
"""launch.timeout, in seconds."""


def context(name: str) -> RankContext:
    """Return this rank of the pool, as join_process_group makes one; each test has meetings of its own."""
    rank, world = dist.get_rank(), dist.get_world_size()
    meeting = Meeting(connect_to_store("tests"), world, name)
    watchdog = Watchdog(rank, world, TIMEOUT)
    return RankContext(rank, rank, world, torch.device("cpu"), watchdog=watchdog, meeting=meeting)


def timeouts(
    config: Config, trained: ParallelDims, others: list[ParallelDims]
) -> tuple[dict[str, float], dict[str, float], dict[str, float]]:
    """Return the seconds of every group: as made, in the first step of a training, and in later ones."""
    ranks = context("timeouts")
    for degrees in others:
        ParallelMesh(degrees, "cpu", 2)
    setup = prepared(config, trained, "sgd")
    assert setup is not None
    model, optimizer, layout = setup
    ranks.in_background()

    def seconds() -> dict[str, float]:
        return {name: timeout.total_seconds() for name, timeout in group_timeouts().items()}

    found = [seconds()]
    ranks.limit_collectives(first_calls=True)
    take_step(TrainStep(model.forward_backward, optimizer, layout, 1.0), 0, 1, "sgd")
    found.append(seconds())  # of groups too that the step has made
    ranks.limit_collectives(first_calls=False)
    found.append(seconds())
    set_group_timeouts(timedelta(minutes=30), besides=PATIENT)
    return found[0], found[1], found[2]


class Counting:
    """A model whose passes are counted."""

    def __init__(self) -> None:
        self.model_parts: list[Any] = []
        self.batches = 0

    def evaluate(self, batch: Any) -> torch.Tensor:
        """Return a loss, and let some ranks be slower than others."""
        self.batches += 1
        return torch.zeros(())


def stopped_evaluation(asked: dict[int, int]) -> tuple[int, bool]:
    """Evaluate on rows without end, where ranks of `asked` hear a signal in the batch that they are given.

    Return after how many batches this rank ended, and whether it then learns in a meeting of a flag.
    """
    ranks = context("evaluation")
    request, model = StopRequest(), Counting()
    stop = StopSignal(request, ranks.meeting and ranks.meeting.apart())

    class Rows(StepRows):
        def __len__(self) -> int:
            return 8 * 30

        def row(self, index: int) -> Any:
            request.requested |= model.batches >= asked.get(ranks.rank, 1000)
            return super().row(index)

    with ExitStack() as stack:
        stack.enter_context(obey(stop))
        try:
            evaluate(cast(Any, model), Rows(), 1, replace(ranks, data=(ranks.rank, ranks.world)))
        except StopEarly:
            return model.batches, ranks.meet(ranks.rank == 3)
    return -1, False
