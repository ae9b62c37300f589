"""The costs of evaluations and samples: what is gathered, sent and cached, and what follows by default."""

import json
from dataclasses import replace

import pytest

from dsv3.config.hardware import HardwareConfig
from dsv3.config.parallel import Schedule
from dsv3.planning import parameters
from dsv3.planning.between_steps import BetweenSteps, Upkeep, cache_bytes
from dsv3.planning.layout import ParallelDims
from dsv3.planning.parameters import Component, Weight
from dsv3.planning.pipeline_stages import PipelineShape
from dsv3.planning.plan import plan_from_shape
from dsv3.planning.report import format_plan
from dsv3.planning.step_shape import StateBytes, StepShape
from tests.harness.commands import PlannedCommand
from tests.planning.presets import preset

H800 = HardwareConfig(
    name="h800",
    memory_bandwidth=3.35e12,
    peak_flops_bf16=989.5e12,
    intra_node_bandwidth=200e9,
    inter_node_bandwidth=50e9,
)
BF16 = StepShape(1, 4096, state=StateBytes(compute=2), ranks_per_node=8)
LARGE = preset("671b")


def costs(degrees: ParallelDims, shape: StepShape = BF16, upkeep: Upkeep | None = None) -> BetweenSteps:
    return BetweenSteps(LARGE, degrees, shape, H800, upkeep or Upkeep())


def bytes_used(weights: list[Weight]) -> int:
    """Return the bytes of weights as they are used: norms and routers in fp32."""
    in_fp32 = (Component.norms, Component.router)
    return sum(weight.numel * (4 if weight.component in in_fp32 else 2) for weight in weights)


def gathered_bytes() -> int:
    """Return those of the main model's layers."""
    return bytes_used([weight for layer in parameters.layers(LARGE) for weight in layer])


def test_a_sample_under_fsdp_gathers_every_layer_for_each_of_its_tokens() -> None:
    sample = costs(ParallelDims(dp_shard=64)).sample()
    assert (sample.tokens, sample.passes, sample.gathers) == (120, 120, 120)
    once = bytes_used(
        [*parameters.embedding(LARGE), *parameters.output(LARGE), *parameters.mtp_modules(LARGE)[0]]
    )
    expected = (120 * gathered_bytes() + once) * 63 / 64
    # 64 ranks divide every weight; MTP's layer is prefetched once, and the root kept.
    assert sample.sent == pytest.approx(expected, rel=1e-6)
    # No faster than its bytes on a ring over nodes of 8: eight ports of 50 GB/s, or 0.8 of the 200 within a
    # node.
    assert expected / 160e9 < sample.seconds < 1.05 * expected / 160e9
    kept = costs(ParallelDims(dp_shard=64), replace(BF16, reshard_after_forward=False)).sample()
    assert kept.gathers == 1
    assert kept.sent == pytest.approx((gathered_bytes() + once) * 63 / 64, rel=1e-6)


def test_the_cache_is_that_of_the_latents_of_the_fullest_stage() -> None:
    assert cache_bytes(LARGE, 61, 120, 2) == 61 * 120 * 576 * 2
    assert costs(ParallelDims(dp_shard=8)).sample().cache == 61 * 120 * 576 * 2
    piped = replace(BF16, microbatches=64, pipelining=PipelineShape(Schedule["1F1B"]))
    assert costs(ParallelDims(pp=16, dp_shard=2), piped).sample().cache == 4 * 120 * 576 * 2


def test_an_evaluation_is_limited_in_tokens_and_split_over_data_parallel_ranks() -> None:
    upkeep = Upkeep(evaluate_tokens=2**18, evaluate_every=50)
    for ranks, passes in ((1, 64), (8, 8), (48, 2), (2048, 1)):
        found = costs(ParallelDims(dp_shard=ranks), upkeep=upkeep).evaluation()
        assert found is not None
        assert (found.tokens, found.passes) == (2**18, passes)
        assert found.gathers == (passes if ranks > 1 else 0)
    assert costs(ParallelDims(), upkeep=replace(upkeep, evaluate_tokens=None)).evaluation() is None
    # A row of the longest context is scored whole.
    longer = costs(ParallelDims(), replace(BF16, sequence_length=2**20), upkeep).evaluation()
    assert longer is not None
    assert longer.tokens == 2**20


def test_the_share_is_that_of_the_training_between_two() -> None:
    shape = replace(BF16, microbatches=8)
    small = replace(shape, microbatch_size=8, microbatches=1)
    upkeep = Upkeep(evaluate_tokens=8 * 4096, evaluate_every=1)
    alike = BetweenSteps(preset("16b"), ParallelDims(), small, H800, upkeep).evaluation()
    assert alike is not None
    # A step of as many tokens passes forward once, twice that backward, and then through the optimizer.
    assert alike.share == pytest.approx(0.3, rel=0.15)
    found = costs(ParallelDims(), shape, upkeep).evaluation()
    assert found is not None
    assert found.share is not None
    rarely = costs(ParallelDims(), shape, Upkeep(evaluate_tokens=8 * 4096, evaluate_every=10)).evaluation()
    never = costs(ParallelDims(), shape, Upkeep(evaluate_every=0)).evaluation()
    assert rarely is not None
    assert never is not None
    assert rarely.share == pytest.approx(found.share / 10)
    assert never.share is None
    whole, cut = (
        costs(ParallelDims(dp_shard=64), upkeep=Upkeep(generate_every=1, generate_seconds=seconds)).sample()
        for seconds in (1e9, 3.0)
    )
    assert whole.share is not None
    assert cut.share == pytest.approx(whole.share * 3.0 / whole.seconds)
    assert cut.seconds == whole.seconds > 3.0


def test_the_json_of_a_plan_has_both() -> None:
    plan = plan_from_shape(LARGE, ParallelDims(dp_shard=8), H800, BF16)
    told = json.loads(json.dumps(plan.to_json()))["between_steps"]
    keys = ["tokens", "passes", "gathers", "sent_bytes", "seconds", "share_of_training", "cache_bytes"]
    assert [list(told[name]) for name in ("evaluation", "sample")] == [keys, keys]
    assert plan_from_shape(preset("debug"), ParallelDims(), HardwareConfig("cpu"), BF16).to_json()


def test_a_run_samples_by_default_where_that_is_cheap(planned: PlannedCommand) -> None:
    cheap = planned.run("task=plan", "hardware=cpu").job
    assert (cheap.config.train.generate_every, cheap.plan.upkeep.generate_every) == (100, 100)
    at_size = ["task=plan", "model=671b", "parallel=fsdp", "launch.world_size=2048", "hardware=h800"]
    costly = planned.run(*at_size).job
    assert (costly.config.train.generate_every, costly.plan.upkeep.generate_every) == (0, 0)
    reason = costly.reasons["train.generate_every"]
    assert "s each" in reason
    assert reason.endswith("more than train.generate_seconds=30")
    patient = planned.run(*at_size, "train.generate_seconds=1000").job
    assert patient.config.train.generate_every == 100
    assert "no sample" not in format_plan(cheap.plan)
    rows = [line.split() for line in format_plan(costly.plan).splitlines()]
    assert ["no", "sample", *reason.split()] in rows
    assert costly.plan.to_json()["between_steps"]["never"] == {"sample": reason}  # type: ignore[index]
    typed = planned.run(*at_size, "train.generate_every=0", "train.evaluate_every=0").job.plan
    assert typed.upkeep.never() == {
        "evaluation": "train.evaluate_every=0",
        "sample": "train.generate_every=0",
    }
    told = [line.split() for line in format_plan(typed).splitlines()]
    assert ["no", "evaluation", "train.evaluate_every=0"] in told
    asked = planned.run(*at_size, "train.generate_every=7").job
    assert asked.config.train.generate_every == 7
    assert "train.generate_every" not in asked.reasons
    # Within the seconds, but a large part of the time of steps of 2,048 tokens, which gather as a sample
    # does.
    small = ["train.sequence_length=256", "hardware=b200", "launch.world_size=8"]
    often = planned.run("task=plan", "model=16b", "parallel=fsdp", *small).job
    assert often.config.train.generate_every == 0
    assert often.reasons["train.generate_every"].endswith("more than 25%")
