"""The shards that the plan counts are those that the wrapped model has, on the first rank of every stage."""

from collections.abc import Iterator

import pytest
import torch
from torch import distributed, nn
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from dsv3.launch.job import plan_job
from dsv3.parallel.mesh import ParallelMesh
from dsv3.parallel.parallel_model import build_parallel_model
from dsv3.planning.memory import pipeline_memory
from tests.harness.composing import strict_config

LAYOUTS = [
    "parallel=fsdp launch.world_size=3 train.global_batch_size=3",
    "parallel=hsdp",
    "parallel=tp_ep",
    "parallel=tp_ep launch.world_size=32",
    "parallel=cp parallel.degrees.tp=4",
    "parallel=pp parallel.degrees.pp=4 parallel.degrees.tp=2",
    "parallel=pp parallel.schedule=Interleaved1F1B",
    "parallel=pp parallel.schedule=DualPipeV launch.world_size=4",
    "parallel=pp parallel.pipeline.split=[2] parallel.degrees.ep=auto launch.world_size=8",
    "parallel=full parallel.degrees.dp_replicate=2",
]


@pytest.fixture
def _no_group_is_left() -> Iterator[None]:
    yield
    if distributed.is_initialized():
        distributed.destroy_process_group()


def local_numbers(parameter: nn.Parameter) -> int:
    return (parameter.to_local() if isinstance(parameter, DTensor) else parameter).numel()


@pytest.mark.usefixtures("_no_group_is_left")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_rank_has_the_numbers_that_are_planned(layout: str) -> None:
    job = plan_job(strict_config(["task=plan", *layout.split()]), [])
    degrees, planned = job.plan.degrees, pipeline_memory(job.config.model, job.plan.degrees, job.plan.shape)
    for stage, memory in enumerate(planned):
        rank = stage * (degrees.world_size // degrees.pp)
        distributed.init_process_group("fake", store=FakeStore(), rank=rank, world_size=degrees.world_size)
        model = build_parallel_model(job.config, ParallelMesh(degrees, "cpu"), torch.device("cpu"))
        held = sum(local_numbers(p) for part in model.model_parts for p in part.parameters())
        distributed.destroy_process_group()
        assert held == memory.parameters // 4
