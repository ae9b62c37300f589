"""Measured traffic of context and expert parallelism, and outside of training, equals its closed forms."""

import pytest

from tests.harness.pool import Pool
from tests.parallel.tiny_training import GLOBAL_BATCH, SEQUENCE
from tests.parallel.traffic_counter import StepTraffic, count_forward, count_step, planned_job

FP32 = 4
LATENT = 16 + 8
DIM, EXPERTS = 32, 8
LAYERS, MOE_LAYERS = 5, 4


def counted(pool: Pool, world: int, *overrides: str) -> list[StepTraffic]:
    steps = pool.run(count_step, planned_job(["parallel=fsdp", "train.microbatch_size=2", *overrides], world))
    return [step for step in steps if step is not None]


@pytest.mark.parametrize(("cp", "recompute"), [(4, "none"), (2, "full")])
def test_cp_sends_latents_forward_and_their_gradients_back(pool: Pool, cp: int, recompute: str) -> None:
    forward_backward = 3 if recompute == "full" else 2
    row = LATENT * SEQUENCE * FP32
    expected = LAYERS * forward_backward * GLOBAL_BATCH * row * (cp - 1) // cp
    steps = counted(pool, cp, f"parallel.degrees.cp={cp}", f"recompute={recompute}")
    assert [step.sent["cp"] for step in steps] == [expected] * cp
    assert [step.planned["cp"] for step in steps] == [expected] * cp


@pytest.mark.parametrize("ep", [2, 4])
def test_ep_sends_a_row_to_a_rank_once_with_its_weights_and_one_back(pool: Pool, ep: int) -> None:
    steps = counted(pool, ep, f"parallel.degrees.ep={ep}")
    there, back = DIM * FP32 + 2 * FP32 * EXPERTS // ep, DIM * FP32
    for rank, step in enumerate(steps):
        sent = sum(step.rows) - step.rows[rank]
        received = sum(other.rows[rank] for other in steps) - step.rows[rank]
        # Backward, gradients of what came go back, and those of what was given back come again.
        assert step.sent["ep"] == (sent + received) * (there + back)
    # The plan assumes that all choices of experts are equally likely; random weights route nearly so.
    mean = sum(step.sent["ep"] for step in steps) / ep
    assert mean == pytest.approx(steps[0].planned["ep"], rel=0.15)
    assert sum(map(sum, (step.rows for step in steps))) > MOE_LAYERS * GLOBAL_BATCH * SEQUENCE


@pytest.mark.parametrize("axis", ["dp_shard", "tp", "cp", "pp"])
def test_a_pass_outside_of_training_sends_what_the_plan_says(pool: Pool, axis: str) -> None:
    job = planned_job(["parallel=fsdp", "train.microbatch_size=2", f"parallel.degrees.{axis}=2"], 2)
    for rank in pool.run(count_forward, job)[:2]:
        for passed in rank:
            assert {axis for axis, (sent, planned) in passed.items() if sent != planned} == set(), passed
