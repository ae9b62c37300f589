"""Every layout generates what one process does, all ranks together."""

import pytest
import torch

from dsv3.config import strict
from dsv3.parallel.degrees import Degrees
from dsv3.parallel.distributed import distribute
from tests.composing import compose
from tests.distributed.pool import Pool
from tests.distributed.training import TINY, mesh_of

PROMPTS = [[5, 6, 7, 8, 9], [1, 2], [3]]
LAYOUTS = {
    "fsdp": Degrees(dp_shard=2),
    "ep": Degrees(dp_shard=2, ep=2),
    "tp": Degrees(tp=2),
    "cp": Degrees(cp=2),
    "pp": Degrees(pp=2),
    "pp x cp x tp": Degrees(pp=2, cp=2, tp=2),
}


def text(overrides: list[str], degrees: Degrees | None, temperature: float) -> list[list[int]] | None:
    """What the tiny model says; None on ranks that the layout leaves out."""
    config = strict(compose([*TINY, "train.microbatch_size=2", *overrides]))
    mesh = mesh_of(degrees) if degrees else None
    if degrees and torch.distributed.get_rank() >= degrees.world_size:
        return None
    model = distribute(config, mesh, torch.device("cpu"))
    return model.generate(PROMPTS, 4, temperature, 0.9, 3, None)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_rank_draws_what_one_process_draws(pool: Pool, layout: str, precision: str) -> None:
    chosen = [f"precision={precision}"]
    for temperature in (0.0, 0.8):
        expected = text(chosen, None, temperature)
        assert expected is not None
        assert len({tuple(row) for row in expected}) == 3
        found = pool.run(text, ["parallel=fsdp", *chosen], LAYOUTS[layout], temperature)
        for rows in found[: LAYOUTS[layout].world_size]:
            if precision == "fp32" or layout in ("fsdp", "ep"):
                assert rows == expected
            else:
                assert rows == found[0]
