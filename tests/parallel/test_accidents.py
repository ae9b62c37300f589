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

LAYOUTS: list[tuple[str, ParallelDims, int, list[str]]] = [
    ("hsdp x tp x ep, bf16 moments", ParallelDims(dp_replicate=2, dp_shard=2, tp=2, ep=4), 2, BF16),
    ("pp x cp, muon", ParallelDims(pp=2, dp_shard=2, cp=2), 1, MUON),
]


@pytest.mark.parametrize(("name", "degrees", "microbatch", "overrides"), LAYOUTS, ids=str)
def test_a_bad_step_changes_nothing_on_any_rank(
    pool: Pool, name: str, degrees: ParallelDims, microbatch: int, overrides: list[str]
) -> None:
    """As on a GPU, where the optimizer skips; on CPU the host does not call it, which whole runs show."""
    config = configured(["parallel=fsdp", *FEW, *overrides], microbatch)
    for rank, (seen, stayed) in enumerate(pool.run(skip_faults, config, degrees, microbatch, True)):
        for fault, skipped in zip(FAULTS, seen, strict=True):
            assert skipped.changed == [], (rank, fault)
            assert skipped.kind == (SPIKE if "too long" in fault else NONFINITE), (rank, fault)
        assert seen[0].named == f"{EXPERT}[5]", rank
        assert stayed == [], rank


@pytest.mark.parametrize(
    ("overrides", "on_device"), [(ADAMW, False), (ADAMW, True), (BF16, True), (MUON, True)], ids=str
)
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
