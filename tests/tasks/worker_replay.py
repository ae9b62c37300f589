"""Worker side: a task as a rank of the pool carries it out, in place of workers that are started for it."""

import contextlib
import io
import itertools
import os
from collections.abc import Iterator
from unittest.mock import patch

import torch
import torch.distributed as dist

from dsv3.config.strict import build
from dsv3.config.task import SamplingConfig
from dsv3.distributed.meeting import Meeting
from dsv3.distributed.process_group import RankContext
from dsv3.distributed.torch_private import connect_to_store
from dsv3.launch.job import Job

_NUMBERS = itertools.count()
"""Each task has meetings of its own."""


def run_task(job: Job) -> str:
    """Carry out a job on this rank; return what it has printed to stdout."""

    @contextlib.contextmanager
    def join(_: Job) -> Iterator[RankContext]:
        rank, world = dist.get_rank(), dist.get_world_size()
        meeting = Meeting(connect_to_store("tests"), world, f"task {next(_NUMBERS)}")
        yield RankContext(rank, rank, world, torch.device("cpu"), meeting=meeting)

    printed = io.StringIO()
    launched = {"RANK": str(dist.get_rank()), "WORLD_SIZE": str(dist.get_world_size())}
    with (
        patch.dict(os.environ, {**launched, "LOCAL_WORLD_SIZE": str(dist.get_world_size())}),
        patch("dsv3.tasks.train.join_ranks", join),
        patch("dsv3.tasks.train.plot_loss_curve", lambda *_: None),
        patch("dsv3.tasks.train.SAMPLING", SamplingConfig(max_tokens=1)),
        patch("dsv3.tasks.replay.join_ranks", join),
        contextlib.redirect_stdout(printed),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        build(job.config.task).run(job)
    return printed.getvalue()
