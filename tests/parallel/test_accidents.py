"""A step with bad numbers changes nothing on any rank of any layout, whichever rank met them."""

import pytest

from dsv3.planning.layout import ParallelDims
from dsv3.training.step_guard import NONFINITE, SPIKE
from tests.harness.pool import Pool
from tests.parallel.tiny_training import configured
from tests.parallel.worker_accidents import EXPERT, FAULTS, losses_of, skip_faults

ADAMW: list[str] = []
BF16 = ["precision.moments=bf16"]
MUON = ["optimizer=muon"]
FEW = ["model.num_layers=3", "precision=fp32"]
ZBV = ["parallel.schedule=ZBVZeroBubble"]

LAYOUTS: list[tuple[str, ParallelDims, int, list[str], bool]] = [
    ("fsdp", ParallelDims(dp_shard=8), 1, ADAMW, True),
    ("fsdp, bf16 moments", ParallelDims(dp_shard=8), 1, BF16, True),
    ("hsdp x tp x ep", ParallelDims(dp_replicate=2, dp_shard=2, tp=2, ep=4), 2, ADAMW, True),
    ("hsdp x tp x ep, muon", ParallelDims(dp_replicate=2, dp_shard=2, tp=2, ep=4), 2, MUON, True),
    ("pp x cp", ParallelDims(pp=2, dp_shard=2, cp=2), 1, ADAMW, True),
    ("pp x cp, by the host", ParallelDims(pp=2, dp_shard=2, cp=2), 1, ["optimizer=adamw"], False),
]


@pytest.mark.parametrize(("name", "degrees", "microbatch", "overrides", "on_device"), LAYOUTS, ids=str)
def test_a_bad_step_changes_nothing_on_any_rank(
    pool: Pool, name: str, degrees: ParallelDims, microbatch: int, overrides: list[str], on_device: bool
) -> None:
    config = configured(["parallel=fsdp", *FEW, *overrides], microbatch)
    for rank, (seen, stayed) in enumerate(pool.run(skip_faults, config, degrees, microbatch, on_device)):
        for fault, skipped in zip(FAULTS, seen, strict=True):
            assert skipped.changed == [], (rank, fault)
            assert skipped.kind == (SPIKE if "too long" in fault else NONFINITE), (rank, fault)
        assert seen[0].named == f"{EXPERT}[5]", rank
        assert [name for name in stayed if not name.endswith("_extra")] == [], rank


@pytest.mark.parametrize("on_device", [False, True])
@pytest.mark.parametrize("overrides", [ADAMW, BF16, MUON], ids=str)
def test_and_on_one_process(overrides: list[str], on_device: bool) -> None:
    """Gradients add up over four microbatches, and their norm is judged as a whole."""
    seen, stayed = skip_faults(configured([*FEW, *overrides], 2), None, 2, on_device)
    assert [skipped.changed for skipped in seen] == [[]] * len(FAULTS)
    assert [skipped.kind for skipped in seen] == [NONFINITE] * 4 + [SPIKE]
    assert seen[0].named == f"{EXPERT}[5]"
    assert stayed == []


def test_a_run_without_accidents_has_the_numbers_of_one_without_the_rule() -> None:
    config = configured(FEW, 2)
    assert losses_of(config, 2, guarded=True) == losses_of(config, 2, guarded=False)
