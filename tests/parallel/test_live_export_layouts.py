"""Live export: every layout streams the same names in the same order, with the same bytes."""

from pathlib import Path

import pytest
import torch

from dsv3.planning.layout import ParallelDims
from tests.convert.releases import write_release
from tests.harness.pool import Pool
from tests.parallel.tiny_training import configured
from tests.parallel.worker_live_export import stream_weights

LAYOUTS = {
    "hsdp x tp, ep": ParallelDims(dp_replicate=2, dp_shard=2, tp=2, ep=4),
    "pp x cp x tp": ParallelDims(pp=2, cp=2, tp=2),
    "dp_shard": ParallelDims(dp_shard=3),
}


def test_one_process_streams_what_a_release_holds(tmp_path: Path) -> None:
    config = configured([f"checkpoint.load=hf:{tmp_path}"], 2)
    released = write_release(tmp_path, configured([], 2).model, "fp32")
    everything = stream_weights(config, None)
    assert everything is not None
    found = everything[torch.float32]
    assert sorted(name for name, _ in found) == sorted(released)
    biases = [name for name in released if name.endswith("e_score_correction_bias")]
    assert biases
    for name, tensor in found:
        if name in biases:  # the tests' model begins with biases of its own
            assert tensor.dtype is torch.float32
        else:
            assert torch.equal(tensor, released[name]), name


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_rank_gets_what_one_process_gets(pool: Pool, layout: str) -> None:
    single = stream_weights(configured([], 2), None)
    assert single is not None
    degrees = LAYOUTS[layout]
    for rank in pool.run(stream_weights, configured(["parallel=fsdp"], 1), degrees)[: degrees.world_size]:
        for dtype, tensors in single.items():
            assert [name for name, _ in rank[dtype]] == [name for name, _ in tensors]
            for (name, mine), (_, other) in zip(rank[dtype], tensors, strict=True):
                assert mine.dtype is other.dtype, name
                same = torch.equal(mine.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8))
                assert same, name
