"""The DeepEP token dispatcher computes what all-to-all does, over a stand-in for its package.

test_token_dispatch.py holds both to closed forms on adversarial routings.
"""

import sys

import pytest
import torch

from dsv3.errors import UserError
from dsv3.parallel.deepep import DeepEPTokenDispatcher
from dsv3.parallel.mesh import ParallelMesh
from dsv3.planning.layout import ParallelDims
from tests.harness.pool import Pool
from tests.parallel.tiny_training import GLOBAL_BATCH, configured
from tests.parallel.trace_comparison import train_on, whole_traces
from tests.parallel.worker_deepep import run_both_backends, train_over_deepep

IN_FP8 = ["precision=fp8", "precision.fp8.dispatch=true", "model.dim=128"]


@pytest.mark.parametrize(("ep", "in_fp8"), [(2, False), (4, False), (4, True)])
def test_results_and_gradients_are_the_same_bits(pool: Pool, ep: int, in_fp8: bool) -> None:
    for found in pool.run(run_both_backends, ep, in_fp8)[:ep]:
        for ours, theirs in zip(*found, strict=True):
            assert torch.equal(ours, theirs)
            assert ours.abs().max() > 0


@pytest.mark.parametrize(
    ("degrees", "overrides"),
    [
        (ParallelDims(dp_shard=2, tp=2, ep=4), [*IN_FP8, "recompute=selective"]),
        (
            ParallelDims(pp=2, dp_shard=2, ep=2),
            ["precision=bf16", "parallel.schedule=ZBVZeroBubble", "recompute=full"],
        ),
    ],
    ids=["fp8, tp, selective", "zero bubble, full"],
)
def test_training_is_the_same(pool: Pool, degrees: ParallelDims, overrides: list[str]) -> None:
    microbatch = GLOBAL_BATCH // degrees.data_parallel // 2
    chosen = ["parallel=fsdp", *overrides]
    plain = train_on(pool, configured(chosen, microbatch), degrees, 1, microbatch)
    config = configured([*chosen, "parallel.expert.backend=deepep"], microbatch)
    found = pool.run(train_over_deepep, config, degrees, microbatch)
    traces = whole_traces([trace for trace, _ in found])
    for rank in range(degrees.world_size):
        trace, buffers = traces[rank], found[rank][1]
        # One on a rank, for both of its stages.
        assert buffers == 1
        assert trace.metrics == plain[rank].metrics
        for ours, theirs in zip(
            [*trace.gradients, trace.state], [*plain[rank].gradients, plain[rank].state], strict=True
        ):
            assert ours.keys() == theirs.keys()
            assert all(torch.equal(ours[name], theirs[name]) for name in ours)
        assert trace.evaluation == plain[rank].evaluation


def test_a_worker_without_the_package_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "deep_ep", None)
    with pytest.raises(UserError, match=r"needs the package deep_ep .*halted.*\n.*backend=all_to_all"):
        DeepEPTokenDispatcher.from_mesh(ParallelMesh.__new__(ParallelMesh), 32)
