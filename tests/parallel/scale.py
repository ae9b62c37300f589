"""One rank of a world that is not there: built on meta over PyTorch's fake process group, and as planned."""

import math
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import torch
from torch import Tensor, distributed
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from dsv3.fp8.convert_model import gather_weights
from dsv3.launch.job import Job, plan_job
from dsv3.parallel.mesh import ParallelMesh, build_mesh
from dsv3.parallel.parallel_model import build_parallel_model
from dsv3.planning.layout import ParallelDims
from dsv3.planning.parameters import Component, Weight
from dsv3.planning.pipeline_stages import stage_groups
from dsv3.planning.sharding import local_shape, shard_count, stored, travels_in_fp8
from tests.config.test_choices import strict_config

Shapes = Counter[tuple[int, ...]]
BUILDERS = ("dsv3.parallel.parallelize.materialize", "dsv3.parallel.pipeline_parallel.materialize")


def plan_world(model: str, layout: str, world: int, *overrides: str) -> Job:
    """The job that `python train.py model=.. parallel=.. launch.world_size=..` would plan."""
    chosen = [f"model={model}", f"parallel={layout}", f"launch.world_size={world}"]
    return plan_job(strict_config(["task=plan", *chosen, *overrides]), [])


@contextmanager
def mesh_as(rank: int, degrees: ParallelDims) -> Iterator[ParallelMesh]:
    """The mesh as `rank` of the whole world sees it; no process group is left behind."""
    distributed.init_process_group("fake", store=FakeStore(), rank=rank, world_size=degrees.world_size)
    try:
        yield build_mesh(degrees, "cpu")
    finally:
        distributed.destroy_process_group()


def build_shards(job: Job, mesh: ParallelMesh) -> list[Tensor]:
    """This rank's part of each parameter of the wrapped model, on meta: all of the build but the memory."""
    with patch(BUILDERS[0]), patch(BUILDERS[1]):
        model = build_parallel_model(job.config, mesh, torch.device("cpu"))
    for part in model.parts:
        gather_weights(part)
    parameters = [p for part in model.parts for p in part.parameters()]
    return [p._local_tensor if isinstance(p, DTensor) else p for p in parameters]


def gathered_in_fp8(shards: list[Tensor]) -> list[Tensor]:
    """Those that FSDP gathers as codes and scales."""
    return [shard for shard in shards if hasattr(shard, "fsdp_pre_all_gather")]


def shapes(shards: list[Tensor]) -> Shapes:
    """How many shards have which shape; empty ones have no shape worth the name."""
    return Counter(tuple(shard.shape) for shard in shards if shard.numel())


def planned_shapes(job: Job, rank: int, in_fp8: bool = False) -> Shapes:
    """The same by the plan's arithmetic, for the first or the last `rank` of the world.

    `in_fp8`: of the weights alone that are gathered so.
    """
    degrees = job.plan.degrees
    stage = rank // (degrees.world_size // degrees.pp)
    held = job.plan.shape.stages_of_ranks(job.config.model, degrees)[stage]
    groups = [group for part in held for group in stage_groups(job.config.model, part)]
    weights = (weight for group in groups for weight in group)
    wanted = (weight for weight in weights if not in_fp8 or travels_in_fp8(weight, degrees))
    found = (_shard_shape(weight, degrees, rank) for weight in wanted)
    return Counter(shape for shape in found if math.prod(shape))


def _shard_shape(weight: Weight, degrees: ParallelDims, rank: int) -> tuple[int, ...]:
    """The last rank has the last shard on every axis; experts fewer than shards are cut by their rows."""
    assert rank in (0, degrees.world_size - 1)
    whole, shards = local_shape(weight, degrees), shard_count(weight, degrees)
    dim = int(weight.component is Component.experts and shards > whole[0])
    numbers = stored(weight, degrees, shards - 1 if rank else 0)
    rows = numbers * whole[dim] // math.prod(whole)
    return (*whole[:dim], rows, *whole[dim + 1 :])
