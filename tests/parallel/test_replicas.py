"""Replicas on every layout: equal while a model trains, and one flipped bit is found, named and not saved."""

from pathlib import Path

import pytest

from dsv3.planning.layout import ParallelDims
from tests.harness.pool import Pool
from tests.parallel.tiny_training import configured
from tests.parallel.worker_replicas import BIT, flip_bits, refuse_to_save

OF_THE_RUN = {"step", "samples", "tokens", "lr", "selection_bias"}
MOMENTS = {"exp_avg", "exp_avg_sq"}
WHOLE = OF_THE_RUN | MOMENTS | {"weight", "gate_up_proj", "down_proj"}
STAGES = ParallelDims(pp=2, cp=2, tp=2, ep=2)

HSDP = ParallelDims(dp_replicate=2, dp_shard=2, tp=2, ep=4)
ENDS = OF_THE_RUN | MOMENTS | {"weight"}

# Layout, optimizer, schedule, the rank whose bits flip, how many ranks hold a bias, and what is replicated.
LAYOUTS = {
    "hsdp, tp_ep": (HSDP, "bf16 moments", "1F1B", 5, 8, WHOLE),
    "full": (STAGES, "adamw", "1F1B", 6, 4, ENDS),
    "both ends on a rank": (ParallelDims(pp=2, dp_shard=2), "adamw", "DualPipeV", 0, 2, ENDS),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_flipped_bit_of_every_kind_of_state_is_found_with_its_rank_and_place(
    pool: Pool, layout: str
) -> None:
    degrees, optimizer, schedule, victim, holders, kinds = LAYOUTS[layout]
    microbatch = 1 if degrees.pp > 1 else 2
    config = configured(["parallel=fsdp", f"parallel.schedule={schedule}"], microbatch)
    ranks = pool.run(flip_bits, config, degrees, microbatch, optimizer, victim)[: degrees.world_size]
    assert all(told == ranks[0] for told in ranks)
    for flip in ranks[0]:
        assert f"rank {victim} (" in flip.told, flip
        assert flip.name in flip.told
        assert len(flip.told) < 500
        assert not flip.is_tensor or f" bit {BIT}" in flip.told, flip
        if flip.kind == "selection_bias" and holders > 2:
            assert f"rank {victim} (" in flip.told.partition(", of ")[0]
            assert f", of {holders} ranks, in " in flip.told
    assert {flip.kind for flip in ranks[0]} >= kinds


def test_a_checkpoint_of_ranks_that_differ_is_refused_on_all_and_the_one_before_stays(
    pool: Pool, tmp_path: Path
) -> None:
    config = configured(["parallel=fsdp"], 1)
    ranks = pool.run(refuse_to_save, config, ParallelDims(dp_replicate=4, dp_shard=2), 1, tmp_path)
    assert {saved for saved, _ in ranks} == {("step-1",)}
    (told,) = {told for _, told in ranks}
    assert told.startswith("after step 2 ranks differ in what they must hold alike: rank 2 (")
    assert ", of 4 ranks, in model.embedding.weight [47, 31] bit 9" in told
    assert told.endswith(f"Go on from the last checkpoint: resume={tmp_path}")
