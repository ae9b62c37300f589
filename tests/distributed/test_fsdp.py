"""Sharded equals single: losses, every gradient and every parameter (docs/parallelism.md)."""

import pytest
import torch

from dsv3.parallel.degrees import Degrees
from tests.distributed.pool import Pool
from tests.distributed.training import Trace, train

STEPS = 3
TOLERANCE = 1e-5


def on_rank(overrides: list[str], degrees: Degrees, microbatch: int) -> Trace:
    return train(overrides, degrees, torch.distributed.get_rank(), STEPS, microbatch)


def on_rank_once(overrides: list[str], degrees: Degrees, microbatch: int) -> Trace:
    return train(overrides, degrees, torch.distributed.get_rank(), 1, microbatch)


@pytest.fixture(scope="module")
def single() -> Trace:
    return train([], None, 0, STEPS, microbatch=4)


@pytest.mark.parametrize(
    ("overrides", "microbatch"),
    [
        ([], 2),
        ([], 1),
        (["parallel.reshard_after_forward=false"], 1),
        (["recompute=full"], 2),
    ],
)
def test_two_shards_train_as_one_process_does(
    pool: Pool, single: Trace, overrides: list[str], microbatch: int
) -> None:
    degrees = Degrees(dp_shard=2)
    traces = pool.run(on_rank, ["parallel=fsdp", *overrides], degrees, microbatch)
    for trace in traces:
        assert_equal(trace, single)


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_two_shards_round_to_bf16_where_one_process_does(pool: Pool, recompute: str) -> None:
    """Router, norms and rotary tables in fp32 on both sides: the first loss is the same number."""
    bf16 = ["precision=bf16", f"recompute={recompute}"]
    single = train(bf16, None, 0, 1, microbatch=2)
    for trace in pool.run(on_rank_once, ["parallel=fsdp", *bf16], Degrees(dp_shard=2), 2):
        for name in ("loss", "mtp_loss", "balance_loss", "moe_entropy"):
            assert trace.figures[0][name] == pytest.approx(single.figures[0][name], rel=1e-7), name
        mine, whole = trace.gradients[0], single.gradients[0]
        # Used twice, by the model and by MTP: FSDP adds the two gradients up in bf16.
        twice = {"embedding.weight", "head.weight"}
        assert_close({n: mine[n] for n in mine.keys() - twice}, {n: whole[n] for n in whole.keys() - twice})
        assert_close({n: mine[n] for n in twice}, {n: whole[n] for n in twice}, tolerance=1e-2)


def test_two_replicas_train_as_one_process_does(pool: Pool, single: Trace) -> None:
    for trace in pool.run(on_rank, ["parallel=fsdp"], Degrees(dp_replicate=2), 2):
        assert_equal(trace, single)


def test_the_comparison_is_not_vacuous(single: Trace) -> None:
    parameters = {name for name in single.state if "selection_bias" not in name}
    for gradients in single.gradients:
        assert gradients.keys() == parameters
        assert all(gradient.norm() > 0 for gradient in gradients.values())
    counted = [figures["moe_max_violation"] for figures in single.figures]
    assert min(counted) > 0


def assert_equal(trace: Trace, single: Trace) -> None:
    for ours, theirs in zip(trace.figures, single.figures, strict=True):
        assert ours.keys() == theirs.keys()
        for name, value in theirs.items():
            assert ours[name] == pytest.approx(value, rel=TOLERANCE), name
    for mine, whole in zip(trace.gradients, single.gradients, strict=True):
        assert_close(mine, whole)
    assert_close(trace.state, single.state)


def assert_close(
    mine: dict[str, torch.Tensor], whole: dict[str, torch.Tensor], tolerance: float = TOLERANCE
) -> None:
    assert mine.keys() == whole.keys()
    for name, tensor in whole.items():
        error = (mine[name] - tensor).norm() / tensor.norm().clamp(min=1e-12)
        assert error <= tolerance, f"{name}: relative error {error:.2e}"
