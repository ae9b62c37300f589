"""Sharded models generate what one process does, all ranks together."""

import pytest
import torch

from dsv3.config import strict
from dsv3.model.generation import generate
from dsv3.parallel.degrees import Degrees
from dsv3.parallel.mesh import build_mesh
from dsv3.parallel.parallelizer import build_model
from tests.composing import compose
from tests.distributed.pool import Pool
from tests.distributed.training import TINY

PROMPTS = [[5, 6, 7, 8, 9], [1, 2], [3]]


def text(overrides: list[str], degrees: Degrees | None, temperature: float) -> list[list[int]]:
    mesh = build_mesh(degrees, "cpu") if degrees else None
    model = build_model(strict(compose([*TINY, *overrides])), mesh, torch.device("cpu"))
    return generate(model, PROMPTS, 6, temperature, 0.9, seed=3, end=None)


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_every_rank_draws_what_one_process_draws(pool: Pool, temperature: float, precision: str) -> None:
    chosen = [f"precision={precision}"]
    expected = text(chosen, None, temperature)
    assert len({tuple(row) for row in expected}) == 3
    for found in pool.run(text, ["parallel=fsdp", *chosen], Degrees(dp_shard=2), temperature):
        assert found == expected
