"""An asynchronous checkpoint of several ranks equals the synchronous one of the same step."""

from pathlib import Path

import pytest

from dsv3.checkpoint.directory import complete_steps
from dsv3.checkpoint.manifest import read_manifest, verify
from dsv3.planning.layout import ParallelDims
from tests.harness.checkpoints import tensors
from tests.harness.pool import Pool
from tests.parallel.tiny_training import configured
from tests.parallel.worker_saving import save_while_training, verify_here

LAYOUTS: list[tuple[ParallelDims, int, list[str]]] = [
    (ParallelDims(dp_replicate=2, dp_shard=2, tp=2, ep=4), 2, []),
    (ParallelDims(pp=2, dp_shard=2, cp=2), 1, ["parallel.schedule=DualPipeV"]),
]


@pytest.mark.parametrize(("degrees", "microbatch", "overrides"), LAYOUTS, ids=str)
def test_a_save_aside_holds_the_state_at_its_call_and_fails_on_all_ranks_or_none(
    pool: Pool, tmp_path: Path, degrees: ParallelDims, microbatch: int, overrides: list[str]
) -> None:
    config = configured(["parallel=fsdp", *overrides], microbatch)
    ranks = pool.run(save_while_training, config, degrees, microbatch, tmp_path)
    assert all(free for free, _ in ranks)
    (once,), (aside,) = complete_steps(tmp_path / "once"), complete_steps(tmp_path / "aside")
    assert tensors(aside) == tensors(once)
    entries = read_manifest(aside) or {}
    assert {name for name in entries if name.endswith(".distcp")} == {
        f"__{rank}_0.distcp" for rank in range(8)
    }
    assert verify(aside)
    told = {message for _, message in ranks}
    assert len(told) == 1
    assert "step 4 cannot be saved: No space left on device (a file of rank 3)" in told.pop()
    assert {path.name for path in (tmp_path / "aside/checkpoints").iterdir()} == {"step-1", "latest"}
    # And all ranks learn of the damage that one of them finds.
    file = aside / "__5_0.distcp"
    file.write_bytes(file.read_bytes()[:-1] + b"\x01")
    told = set(pool.run(verify_here, aside, pool.size))
    assert len(told) == 1
    assert told.pop().startswith(f"{file} is altered: its XXH3-128 is ")
