"""Resume: a run continues bit for bit on another layout, pipeline stages included."""

from pathlib import Path

import pytest
import torch

from dsv3.planning.layout import ParallelDims
from tests.harness.pool import Pool
from tests.parallel.tiny_training import configured, train
from tests.parallel.trace_comparison import assert_close
from tests.parallel.worker_resume import State, resume_one_step

BF16 = "bf16 moments"
# All ranks of the process group save, so every layout has the pool's 8 ranks.
LAYOUTS: list[tuple[ParallelDims, int, list[str]]] = [
    (ParallelDims(dp_shard=8), 1, []),
    (ParallelDims(pp=2, dp_shard=2, cp=2), 1, ["parallel.schedule=DualPipeV"]),
    (ParallelDims(dp_replicate=2, dp_shard=2, tp=2, ep=4), 2, []),
    (ParallelDims(pp=2, cp=2, tp=2, ep=2), 2, ["parallel.schedule=Interleaved1F1B"]),
    (ParallelDims(pp=4, dp_shard=2), 1, ["parallel.schedule=1F1B"]),
]


def test_a_run_goes_on_from_layout_to_layout(pool: Pool, tmp_path: Path) -> None:
    saved: State = {}
    for number, (degrees, microbatch, overrides) in enumerate(LAYOUTS):
        config = configured(["parallel=fsdp", *overrides], microbatch)
        ranks = pool.run(resume_one_step, config, degrees, microbatch, tmp_path)
        assert [step for step, _, _ in ranks] == [number] * pool.size
        if saved:
            for _, before, _ in ranks:
                assert all(torch.equal(tensor, saved[name]) for name, tensor in before.items())
            assert set().union(*(before for _, before, _ in ranks)) == set(saved)
        saved = {name: tensor for _, _, after in ranks for name, tensor in after.items()}
    moments = {name.rpartition(".")[2] for name in saved if name.startswith("optimizer.")}
    assert moments == {"step", "exp_avg", "exp_avg_sq"}
    # Five layouts in turn end where one process ends.
    single = train([], None, len(LAYOUTS), 2, "adamw")
    assert single is not None
    assert_close(
        {name.removeprefix("model."): t for name, t in saved.items() if name.startswith("model.")},
        single.state,
    )


@pytest.mark.parametrize("layout", [3])
def test_one_process_goes_on_with_what_many_have_saved(pool: Pool, tmp_path: Path, layout: int) -> None:
    degrees, microbatch, overrides = LAYOUTS[layout]
    config = configured(["parallel=fsdp", *overrides], microbatch)
    ranks = pool.run(resume_one_step, config, degrees, microbatch, tmp_path)
    step, before, _ = resume_one_step(configured(["parallel=none"], 2), None, 2, tmp_path)
    assert step == 1
    for _, _, after in ranks:
        assert all(torch.equal(tensor, before[name]) for name, tensor in after.items())
    # The other way round: one process has saved step 2.
    ranks = pool.run(resume_one_step, config, degrees, microbatch, tmp_path)
    assert ranks[0][0] == 2


def test_bf16_moments_go_from_a_layout_to_one_process_and_are_what_it_would_have(
    pool: Pool, tmp_path: Path
) -> None:
    degrees, microbatch, overrides = LAYOUTS[2]
    config = configured(["parallel=fsdp", *overrides], microbatch)
    ranks = pool.run(resume_one_step, config, degrees, microbatch, tmp_path, BF16)
    saved = {name: tensor for _, _, after in ranks for name, tensor in after.items()}
    step, before, _ = resume_one_step(configured(["parallel=none"], 2), None, 2, tmp_path, BF16)
    assert step == 1
    assert saved.keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in saved.items())
    moments = [tensor for name, tensor in saved.items() if "exp_avg" in name]
    assert {tensor.dtype for tensor in moments} == {torch.bfloat16}
    assert all(tensor.any() for tensor in moments)
    single = train([], None, 1, 2, BF16)
    assert single is not None
    assert_close(
        {name.removeprefix("model."): t for name, t in saved.items() if name.startswith("model.")},
        single.state,
    )
