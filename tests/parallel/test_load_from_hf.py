"""Training from a released FP8 checkpoint (`checkpoint.load=hf:DIR`); each rank reads its own slices."""

from pathlib import Path

import pytest

from dsv3.planning.layout import ParallelDims
from tests.convert.releases import write_release
from tests.harness.pool import Pool
from tests.parallel.tiny_training import configured, train_config
from tests.parallel.trace_comparison import assert_equal

LAYOUTS = {
    "fsdp x tp x ep": (ParallelDims(dp_shard=4, tp=2, ep=4), 1),
    "pp x cp x tp, ep": (ParallelDims(pp=2, cp=2, tp=2, ep=2), 2),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_losses_and_weights_are_those_of_one_process(pool: Pool, tmp_path: Path, layout: str) -> None:
    degrees, microbatch = LAYOUTS[layout]
    single_config = configured([], 2)
    write_release(tmp_path, single_config.model, "fp8", block=(7, 10), scales_apart=True)
    load = f"checkpoint.load=hf:{tmp_path}"
    single = train_config(configured([load], 2), None, 2, 2, "sgd")
    fresh = train_config(single_config, None, 1, 2, "sgd")
    assert single is not None
    assert fresh is not None
    assert abs(single.metrics[0]["loss"] - fresh.metrics[0]["loss"]) > 1e-3
    config = configured(["parallel=fsdp", load], microbatch)
    assert_equal(pool.run(train_config, config, degrees, 2, microbatch, "sgd"), single)
