"""Generation: every layout draws what one process draws, all ranks together."""

import pytest
import torch

from dsv3.config.root import Config
from dsv3.parallel.parallel_model import build_parallel_model
from dsv3.planning.layout import ParallelDims
from tests.harness.pool import Pool
from tests.parallel.tiny_training import configured, mesh_of

PROMPTS = [[5, 6, 7, 8, 9], [1, 2], [3]]
LAYOUTS = {
    "fsdp": ParallelDims(dp_shard=2),
    "ep": ParallelDims(dp_shard=2, ep=2),
    "tp": ParallelDims(tp=2),
    "cp": ParallelDims(cp=2),
    "pp": ParallelDims(pp=2),
    "pp x cp x tp": ParallelDims(pp=2, cp=2, tp=2),
}


def generate_ids(config: Config, degrees: ParallelDims | None) -> list[list[list[int]]] | None:
    """Generate greedily and at random; None on ranks that the layout leaves out."""
    mesh = mesh_of(degrees) if degrees else None
    if degrees and torch.distributed.get_rank() >= degrees.world_size:
        return None
    model = build_parallel_model(config, mesh, torch.device("cpu"))
    return [model.generate(PROMPTS, 4, temperature, 0.9, 3, ()) for temperature in (0.0, 0.8)]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_rank_draws_what_one_process_draws(pool: Pool, layout: str, precision: str) -> None:
    chosen = [f"precision={precision}"]
    expected = generate_ids(configured(chosen, 2), None)
    assert expected is not None
    assert all(len({tuple(row) for row in rows}) == 3 for rows in expected)
    found = pool.run(generate_ids, configured(["parallel=fsdp", *chosen], 2), LAYOUTS[layout])
    for rank in found[: LAYOUTS[layout].world_size]:
        if precision == "fp32" or layout in ("fsdp", "ep"):
            assert rank == expected
        else:
            assert rank == found[0]
