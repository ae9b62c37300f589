"""FP8 on several ranks: the values of one process where the tiles are the same, its errors where they differ.

The layout decides which values share a tile: tiles along tokens depend on a rank's tokens, tiles along
features on its columns under tensor parallelism. Forced load balance keeps rounding from sending a token to
another expert.
"""

from statistics import median

import pytest
import torch

from tests.harness.pool import Pool
from tests.parallel.parity_layouts import PAIRS, SINGLES, TRIPLES
from tests.parallel.tiny_training import Trace, configured, train
from tests.parallel.trace_comparison import TOLERANCE, assert_close, relative_error, train_on

LAYOUTS = {**SINGLES, **PAIRS, **TRIPLES}
FP32 = ["model.moe.forced_balance=true", "model.init_std=0.05"]
FP8 = [*FP32, "precision=fp8", "precision.compute=fp32"]
# Rows of 128 in every shard but those of small latents, so that whole blocks travel.
WIDE = ["model.dim=256", "model.dense_hidden_dim=256", "model.moe.hidden_dim=128"]
GATHERED = "precision.fp8.gather=true"


def first_step(pool: Pool, layout: str, overrides: list[str]) -> list[Trace]:
    config = configured(["parallel=fsdp", *overrides], 2)
    return train_on(pool, config, LAYOUTS[layout], 1, 2)


def one_process(overrides: list[str], microbatch: int = 2) -> Trace:
    """Return the trace of the first step on one process."""
    trace = train(overrides, None, 1, microbatch)
    assert trace is not None
    return trace


@pytest.mark.parametrize(
    ("layout", "more"), [("pp", ["parallel.schedule=ZBVZeroBubble"]), ("dp_replicate x dp_shard", [])]
)
def test_where_tiles_are_the_same_so_are_loss_and_gradients(pool: Pool, layout: str, more: list[str]) -> None:
    single = one_process(FP8)
    for trace in first_step(pool, layout, [*FP8, *more]):
        assert trace.metrics[0]["loss"] == pytest.approx(single.metrics[0]["loss"], rel=TOLERANCE)
        assert trace.metrics[0]["fp8_broken_tiles"] == 0
        assert_close(trace.gradients[0], single.gradients[0])


# Under tp and ep FSDP's shards are strided ones, and under tp some end within a block: they go in bf16.
@pytest.mark.parametrize(
    ("layout", "more"),
    [
        ("dp_shard", ["compile=on", "compile.backend=aot_eager", "model.num_layers=1"]),
        ("dp_shard x tp", []),
        ("dp_shard x ep", []),
        ("ep", []),
    ],
)
def test_weights_gathered_in_fp8_are_those_that_products_would_make(
    pool: Pool, layout: str, more: list[str]
) -> None:
    chosen = ["precision=fp8", *FP32, *WIDE, *more]
    plain, gathered = (first_step(pool, layout, [*chosen, *extra]) for extra in ([], [GATHERED]))
    for one, other in zip(plain, gathered, strict=True):
        assert one.metrics == other.metrics
        for name, gradient in one.gradients[0].items():
            assert torch.equal(gradient, other.gradients[0][name]), name


def test_in_bf16_shards_round_what_one_process_does_not_and_no_more(pool: Pool) -> None:
    chosen = ["precision=fp8", *FP32]
    single = one_process(chosen)
    for trace in first_step(pool, "dp_shard", chosen):
        # Gradients of gathered bf16 weights are bf16 before they are summed in fp32.
        assert_close(trace.gradients[0], single.gradients[0], 2.0**-8)
        assert trace.metrics[0]["loss"] == pytest.approx(single.metrics[0]["loss"], rel=TOLERANCE)


@pytest.mark.parametrize(
    ("layout", "more"),
    [
        ("tp", []),
        ("cp", ["recompute=selective"]),
        ("ep", ["precision.fp8.dispatch=true", "recompute=full"]),
        ("dp_shard x ep", ["precision.fp8.dispatch=true", "precision.compute=bf16"]),
    ],
)
def test_where_tiles_differ_the_error_is_that_of_one_process(
    pool: Pool, layout: str, more: list[str]
) -> None:
    exact, single = one_process(FP32), one_process(FP8)
    usual = errors(single, exact)
    for trace in first_step(pool, layout, [*FP8, *more]):
        assert trace.metrics[0]["loss"] == pytest.approx(exact.metrics[0]["loss"], rel=5e-3)
        found = errors(trace, exact)
        assert all(error < 3 * usual[name] + 0.01 for name, error in found.items()), found
        assert median(found.values()) < 1.3 * median(usual[name] for name in found)


def errors(trace: Trace, exact: Trace) -> dict[str, float]:
    """Return each gradient's relative error."""
    return {name: relative_error(g, exact.gradients[0][name]) for name, g in trace.gradients[0].items()}
