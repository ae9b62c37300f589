"""One rank of a large world over PyTorch's fake process group; nothing of dsv3 is replaced."""

import math
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from unittest.mock import patch

import torch
from torch import Tensor, distributed
from torch.distributed.tensor import DTensor, debug
from torch.testing._internal.distributed.fake_pg import FakeStore

from dsv3.data.batch import Batch
from dsv3.distributed.process_group import RankContext
from dsv3.fp8.convert_model import enable_fp8_all_gather
from dsv3.launch.job import Job, plan_job
from dsv3.parallel.mesh import ParallelMesh, assign_data_shard
from dsv3.parallel.parallel_model import ParallelModel, build_parallel_model
from dsv3.planning.layout import ParallelDims
from dsv3.planning.parameters import Component, Weight
from dsv3.planning.pipeline_stages import stage_weights
from dsv3.planning.sharding import is_gathered_in_fp8, local_shape, shard_count, shard_numel
from dsv3.tasks.setup import build_mesh, load_parts
from dsv3.training.optimizer import build_optimizer
from dsv3.training.schedule import StepHyperparameters
from dsv3.training.step import StepMetrics, TrainStep
from tests.harness.composing import strict_config

Shapes = Counter[tuple[int, ...]]
RANKS_PER_NODE = 8


@contextmanager
def fake_rank(rank: int, world: int) -> Iterator[RankContext]:
    """Be `rank` of `world` ranks that are not there, as torchrun would have started it.

    PyTorch's fake group gives a rank what it sends itself, as if all others did the same, and leaves sums as
    they are. It has no all-to-all: here every other rank sends as many rows as it gets. Between the stages of
    a pipeline nothing arrives. No process group is left behind.
    """
    node = min(world, RANKS_PER_NODE)
    started = {"RANK": rank, "LOCAL_RANK": rank % node, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": node}
    with (
        patch.dict("os.environ", {name: str(value) for name, value in started.items()}),
        torch.library._scoped_library("_c10d_functional", "IMPL") as library,
    ):
        library.impl("all_to_all_single", _all_to_all, "CPU")
        distributed.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
        try:
            yield RankContext(rank, rank % node, world, torch.device("cpu"))
        finally:
            distributed.destroy_process_group()
            # DTensor keeps results of operators with their meshes, and the mesh of another rank is equal.
            debug._clear_sharding_prop_cache()
            debug._clear_fast_path_sharding_prop_cache()


def _all_to_all(x: Tensor, received: list[int], sent: list[int], group: str) -> Tensor:
    """Return the rows of `x` [rows, ..] in the place of those that the other ranks would send."""
    out = x.new_zeros(sum(received), *x.shape[1:])
    rows = min(len(out), len(x))
    out[:rows] = x[:rows]
    return out


def start(overrides: list[str], ranks: RankContext, done: Callable[[str], object]) -> ParallelModel:
    """Go from a command line to a model with its weights, as the tasks do; call `done` after each phase."""
    job = plan_job(strict_config(overrides), overrides)
    done("compose and plan")
    mesh = build_mesh(job, ranks)
    done("mesh")
    model = load_parts(job.config, mesh, ranks)
    done("build and load" if job.config.checkpoint.load else "build and draw")
    return model


def take_step(overrides: list[str], ranks: RankContext, model: ParallelModel) -> StepMetrics:
    """Take one optimizer step on random tokens, as many as the command's global batch gives this rank."""
    job = plan_job(strict_config(overrides), overrides)
    config, shares = job.config, job.plan.degrees.data_parallel
    optimizer = build_optimizer(config.optimizer, model.model_parts, config.precision.moments)
    ranks = assign_data_shard(ranks, model.mesh)
    step = TrainStep(model.forward_backward, optimizer, ranks, config.train.clip_norm)
    generator = torch.Generator().manual_seed(ranks.rank)
    shape, batches = (config.train.microbatch, config.train.length), []
    for _ in range(config.train.batch // (config.train.microbatch * shares)):
        tokens = torch.randint(0, config.model.vocab_size, shape, generator=generator)
        batches.append(Batch(tokens, tokens.roll(-1, 1), torch.zeros_like(tokens)))
    return step(batches, StepHyperparameters(1e-3, 0.3, 1e-4, 0.001, 0.0))


def local_shards(model: ParallelModel) -> list[Tensor]:
    """Return this rank's shards of all parameters."""
    parameters = [p for part in model.model_parts for p in part.parameters()]
    return [p._local_tensor if isinstance(p, DTensor) else p for p in parameters]


def plan_world(model: str, layout: str, world: int, *overrides: str) -> Job:
    """Plan the job of `python train.py model=.. parallel=.. launch.world_size=..`."""
    chosen = [f"model={model}", f"parallel={layout}", f"launch.world_size={world}"]
    return plan_job(strict_config(["task=plan", *chosen, *overrides]), [])


def build_on_meta(job: Job, rank: int) -> list[Tensor]:
    """Build the wrapped model of `rank` on the meta device and return its shards: they take no memory."""
    meta = torch.device("meta")
    with fake_rank(rank, job.plan.degrees.world_size):
        mesh = ParallelMesh(job.plan.degrees, "cpu")
        model = build_parallel_model(job.config, mesh, meta, initial=False)
    for part in model.model_parts:
        enable_fp8_all_gather(part)
    return local_shards(model)


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
