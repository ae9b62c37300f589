"""Large worlds: a rank's shards have the shapes that the plan computes (benchmarks/scale.py sweeps them)."""

import math

import pytest

from dsv3.planning.memory import pipeline_memory
from tests.parallel.fake_world import (
    build_shards,
    gathered_in_fp8,
    mesh_as,
    plan_world,
    planned_shapes,
    shapes,
)

pytestmark = pytest.mark.slow

FP32 = 4
IN_FP8 = ["precision=fp8", "precision.fp8.gather=true", "hardware=h800"]
RANKS = [
    ("671b", "tp_ep", 2048, "first"),
    ("671b", "tp_ep", 2048, "last"),
    ("671b", "cp", 2048, "last"),
    ("debug", "tp_ep", 4, "first"),
    ("debug", "hsdp", 2, "last"),
    ("671b", "pp", 2048, "first"),
    ("671b", "pp", 2048, "last"),
    ("671b", "full", 2048, "first"),
    ("671b", "full", 2048, "last"),
    ("kimi_k2", "pp", 4096, "first"),
    ("kimi_k2", "pp", 4096, "last"),
]


@pytest.mark.parametrize(("model", "layout", "world", "end"), RANKS)
def test_a_rank_of_a_large_world_has_the_shards_that_are_planned(
    model: str, layout: str, world: int, end: str
) -> None:
    job = plan_world(model, layout, world, *IN_FP8)
    degrees, rank = job.plan.degrees, world - 1 if end == "last" else 0
    assert degrees.world_size == world
    with mesh_as(rank, degrees) as mesh:
        shards = build_shards(job, mesh)
    assert {shard.device.type for shard in shards} == {"meta"}
    expected = planned_shapes(job, rank)
    assert shapes(shards) == expected
    assert shapes(gathered_in_fp8(shards)) == planned_shapes(job, rank, in_fp8=True)
    held = sum(shard.nbytes for shard in shards)
    assert held == FP32 * sum(math.prod(shape) * count for shape, count in expected.items())
    fullest = pipeline_memory(job.config.model, degrees, job.plan.shape)[-1 if rank else 0].parameters
    # The plan tells the first shards' bytes; where they divide unevenly the last ones are shorter.
    assert held <= fullest if rank else held == fullest
