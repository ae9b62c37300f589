"""Training from a released FP8 checkpoint (`checkpoint.load=hf:DIR`); each rank reads its own slices."""

from pathlib import Path

import pytest
import torch

from dsv3.planning.layout import ParallelDims
from tests.convert.releases import random_weights, write_release
from tests.harness.pool import Pool
from tests.parallel.tiny_training import configured, train_config
from tests.parallel.trace_comparison import assert_equal, train_on
from tests.parallel.worker_loading import refusal

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
    assert_equal(train_on(pool, config, degrees, 2, microbatch), single)


def test_every_rank_names_what_one_of_them_reads(pool: Pool, tmp_path: Path) -> None:
    """The last expert is of one rank alone, and so are the last rows of the embedding."""
    config = configured(["parallel=fsdp"], 1)
    experts = config.model.moe.num_experts
    for name, value, told in (
        (f"model.layers.3.mlp.experts.{experts - 1}.down_proj.weight", torch.nan, "with the value nan at"),
        ("model.layers.4.embed_tokens.weight", 7.0, "is not equal to 'model.embed_tokens.weight'"),
    ):
        weights = random_weights(config.model)
        weights[name] = weights[name].clone()
        weights[name][-1, -1] = value
        write_release(tmp_path, config.model, weights=weights)
        loading = configured(["parallel=fsdp", f"checkpoint.load=hf:{tmp_path}"], 1)
        refusals = pool.run(refusal, loading, LAYOUTS["fsdp x tp x ep"][0])
        assert len(refusals) == 8
        assert all(f"'{name}'" in each and told in each for each in refusals), refusals
