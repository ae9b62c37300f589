"""One rank of a large world, built on meta over PyTorch's fake process group, and its planned shards."""

import math
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import torch
from torch import Tensor, distributed
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from dsv3.fp8.convert_model import enable_fp8_all_gather
from dsv3.launch.job import Job, plan_job
from dsv3.parallel.mesh import ParallelMesh
from dsv3.parallel.parallel_model import build_parallel_model
from dsv3.planning.layout import ParallelDims
from dsv3.planning.parameters import Component, Weight
from dsv3.planning.pipeline_stages import stage_weights
from dsv3.planning.sharding import is_gathered_in_fp8, local_shape, shard_count, shard_numel
from tests.harness.composing import strict_config

Shapes = Counter[tuple[int, ...]]
BUILDERS = ("dsv3.parallel.parallelize.materialize", "dsv3.parallel.pipeline_parallel.materialize")


def plan_world(model: str, layout: str, world: int, *overrides: str) -> Job:
    """Plan the job of `python train.py model=.. parallel=.. launch.world_size=..`."""
    chosen = [f"model={model}", f"parallel={layout}", f"launch.world_size={world}"]
    return plan_job(strict_config(["task=plan", *chosen, *overrides]), [])


@contextmanager
def mesh_as(rank: int, degrees: ParallelDims) -> Iterator[ParallelMesh]:
    """Yield the mesh as `rank` of the whole world sees it; no process group is left behind."""
    distributed.init_process_group("fake", store=FakeStore(), rank=rank, world_size=degrees.world_size)
    try:
        yield ParallelMesh(degrees, "cpu")
    finally:
        distributed.destroy_process_group()


def build_shards(job: Job, mesh: ParallelMesh) -> list[Tensor]:
    """Build the wrapped model on meta and return this rank's shards: the whole build but its memory."""
    with patch(BUILDERS[0]), patch(BUILDERS[1]):
        model = build_parallel_model(job.config, mesh, torch.device("cpu"))
    for part in model.model_parts:
        enable_fp8_all_gather(part)
    parameters = [p for part in model.model_parts for p in part.parameters()]
    return [p._local_tensor if isinstance(p, DTensor) else p for p in parameters]


def gathered_in_fp8(shards: list[Tensor]) -> list[Tensor]:
    """Return the shards that FSDP all-gathers as codes and scales."""
    return [shard for shard in shards if hasattr(shard, "fsdp_pre_all_gather")]


def shapes(shards: list[Tensor]) -> Shapes:
    """Count the shards by shape, without empty ones."""
    return Counter(tuple(shard.shape) for shard in shards if shard.numel())


def planned_shapes(job: Job, rank: int, in_fp8: bool = False) -> Shapes:
    """Count the shards by shape from the plan's arithmetic, for the first or the last `rank` of the world.

    `in_fp8` counts only the weights that are gathered in FP8.
    """
    degrees = job.plan.degrees
    stage = rank // (degrees.world_size // degrees.pp)
    held = job.plan.shape.stages_of_ranks(job.config.model, degrees)[stage]
    groups = [group for part in held for group in stage_weights(job.config.model, part)]
    weights = (weight for group in groups for weight in group)
    wanted = (weight for weight in weights if not in_fp8 or is_gathered_in_fp8(weight, degrees))
    found = (_shard_shape(weight, degrees, rank) for weight in wanted)
    return Counter(shape for shape in found if math.prod(shape))


def _shard_shape(weight: Weight, degrees: ParallelDims, rank: int) -> tuple[int, ...]:
    """Return a weight's shard shape; the last rank has the last shard on every axis.

    Where there are fewer experts than shards, the shards are slices of experts' rows.
    """
    assert rank in (0, degrees.world_size - 1)
    whole, shards = local_shape(weight, degrees), shard_count(weight, degrees)
    dim = int(weight.component is Component.experts and shards > whole[0])
    numbers = shard_numel(weight, degrees, shards - 1 if rank else 0)
    rows = numbers * whole[dim] // math.prod(whole)
    return (*whole[:dim], rows, *whole[dim + 1 :])
