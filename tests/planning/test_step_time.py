"""The time of a step: its causes, what makes it longer or shorter, and what a plan tells of it."""

import json
from collections.abc import Callable
from dataclasses import fields, replace

import pytest

from dsv3.config.hardware import HardwareConfig, KernelConfig, NetworkConfig, OverlapConfig
from dsv3.config.parallel import DispatchBackend, RecomputeMode, SavedOp, Schedule
from dsv3.planning.hardware import named_hardware, preset_hardware
from dsv3.planning.layout import ParallelDims
from dsv3.planning.memory import rank_memory
from dsv3.planning.parameters import FlopsConvention
from dsv3.planning.pipeline_stages import PipelineShape
from dsv3.planning.plan import plan_from_shape
from dsv3.planning.report import format_plan
from dsv3.planning.stage_time import exposed
from dsv3.planning.step_shape import FP8Shape, StateBytes, StepShape
from dsv3.planning.step_time import Cause, StepTime, least_seconds, step_time
from tests.planning.presets import preset

LARGE, SMALL = preset("671b"), preset("16b")
H100 = preset_hardware("h100")
BF16 = StepShape(1, 4096, microbatches=32, state=StateBytes(compute=2), ranks_per_node=8)
V = replace(BF16, pipelining=PipelineShape(Schedule.DualPipeV, 2), reshard_after_forward=False)
LAYOUTS = {
    "fsdp": (ParallelDims(dp_shard=64), BF16),
    "hsdp": (ParallelDims(dp_replicate=4, dp_shard=16, ep=16), BF16),
    "pp": (ParallelDims(pp=16, dp_shard=64, ep=64), V),
    "full": (ParallelDims(pp=4, dp_shard=8, cp=2, tp=4, ep=64), replace(BF16, recompute=RecomputeMode.full)),
    "deepep": (ParallelDims(pp=4, dp_shard=64, ep=64), replace(BF16, dispatch=DispatchBackend.deepep)),
    "short": (ParallelDims(dp_shard=64, ep=64), replace(BF16, sequence_length=128)),
    "fp8": (ParallelDims(dp_shard=64, ep=64), replace(BF16, fp8=FP8Shape(True, True), compiled=True)),
}


def timed(layout: str, hardware: HardwareConfig = H100, **changes: object) -> StepTime:
    degrees, shape = LAYOUTS[layout]
    found = step_time(LARGE, degrees, replace(shape, **changes), hardware)  # type: ignore[arg-type]
    assert found is not None
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
def test_causes_sum_to_the_seconds_of_the_slowest_rank(layout: str) -> None:
    found = timed(layout)
    assert sum(found.causes.values()) == pytest.approx(found.seconds)
    assert min(found.causes.values()) >= 0
    outside = found.causes[Cause.dp] + found.causes[Cause.optimizer]
    assert found.seconds == pytest.approx(found.pipeline.seconds + outside)
    busiest = max(map(found.pipeline.busy, range(LAYOUTS[layout][0].pp)))
    assert found.causes[Cause.bubble] == pytest.approx(found.pipeline.seconds - busiest, abs=1e-9)
    least = least_seconds(LARGE, *LAYOUTS[layout], H100)
    assert least is not None
    assert least == pytest.approx(found.seconds - found.causes[Cause.bubble])
    degrees = LAYOUTS[layout][0]
    axes = {Cause.tp: degrees.tp, Cause.cp: degrees.cp, Cause.ep: degrees.ep, Cause.bubble: degrees.pp}
    for cause, degree in axes.items():
        assert (found.causes[cause] > 0) is (degree > 1)


def test_the_optimizer_moves_40_bytes_per_element_of_a_shard() -> None:
    """The norm, clipping and the update read 4 x 4; parameters and two moments are read and written: 24."""
    degrees, shape = LAYOUTS["fsdp"]
    elements = rank_memory(LARGE, degrees, shape).gradients // 4
    assert H100.memory_bandwidth is not None
    rate = H100.memory_bandwidth * H100.kernels.optimizer
    assert timed("fsdp").causes[Cause.optimizer] == pytest.approx(40 * elements / rate)


def test_tokens_and_rates_are_those_of_the_whole_step() -> None:
    found = timed("pp")
    assert found.tokens == 64 * 32 * 4096
    assert found.tokens_per_second_per_gpu == pytest.approx(found.tokens / found.seconds / 1024)
    assert found.gpu_hours_per_trillion_tokens == pytest.approx(1e12 / found.tokens_per_second_per_gpu / 3600)
    assert found.days_per_trillion_tokens * 24 * 1024 == pytest.approx(found.gpu_hours_per_trillion_tokens)


Change = Callable[[HardwareConfig], HardwareConfig]


def doubled(key: str) -> Change:
    return lambda hardware: replace(hardware, **{key: 2 * getattr(hardware, key)})


FASTER: dict[str, Change] = {
    key: doubled(key)
    for key in (
        "memory_bandwidth",
        "peak_flops_bf16",
        "peak_flops_fp8",
        "peak_flops_fp32",
        "intra_node_bandwidth",
        "inter_node_bandwidth",
    )
}
NODES = {"kernels": KernelConfig, "network": NetworkConfig, "overlap": OverlapConfig}


def faster(node: str, key: str) -> Change:
    """Return a change to a share that is higher, or to seconds or a cost that are lower."""

    def change(hardware: HardwareConfig) -> HardwareConfig:
        own = getattr(hardware, node)
        value = getattr(own, key)
        better = value / 2 if key.endswith("seconds") or key == "cost" else min(1.0, value + 0.1)
        return replace(hardware, **{node: replace(own, **{key: better})})

    return change


FASTER |= {f"{node}.{f.name}": faster(node, f.name) for node, kind in NODES.items() for f in fields(kind)}


@pytest.mark.parametrize("better", FASTER)
def test_better_hardware_is_never_slower_and_each_number_counts_somewhere(better: str) -> None:
    gains = [timed(layout).seconds / timed(layout, FASTER[better](H100)).seconds for layout in LAYOUTS]
    assert min(gains) >= 1 - 1e-9
    assert max(gains) > 1 or better == "overlap.pp"  # which hides all by default
    waits = replace(H100, overlap=replace(H100.overlap, pp=0.0))
    assert timed("pp", waits).seconds > timed("pp").seconds


@pytest.mark.parametrize("layout", ["fsdp", "pp"])
def test_more_recomputation_is_never_faster_and_never_takes_more_memory(layout: str) -> None:
    selective = {"recompute": RecomputeMode.selective}
    steps: list[dict[str, object]] = [
        {},
        {**selective, "keep": tuple(SavedOp)},
        {**selective, "keep": (SavedOp.attention, SavedOp.exchange)},
        {"recompute": RecomputeMode.full},
    ]
    times = [timed(layout, H100, **changes).seconds for changes in steps]
    assert times == sorted(times)
    assert times[0] < times[1] < times[2] < times[3]
    degrees, shape = LAYOUTS[layout]
    shapes = [replace(shape, **changes) for changes in steps]  # type: ignore[arg-type]
    memory = [rank_memory(LARGE, degrees, each).activations for each in shapes]
    assert memory == sorted(memory, reverse=True)


def test_dispatch_is_hidden_where_software_hides_it() -> None:
    paired = replace(H100, overlap=replace(H100.overlap, ep_paired=1.0))
    assert timed("pp", paired).causes[Cause.ep] < 0.3 * timed("pp").causes[Cause.ep]
    assert timed("fp8", paired).seconds == timed("fp8").seconds  # another schedule
    hidden = replace(H100, overlap=replace(H100.overlap, ep=1.0, cost=0.0))
    assert timed("fp8", hidden).causes[Cause.ep] == 0


def test_a_layer_that_is_computed_again_dispatches_again_unless_that_is_kept() -> None:
    """There and back in the forward pass, and in the backward pass; recomputation adds a third time."""
    nothing_hides = replace(H100, overlap=replace(H100.overlap, ep=0.0))

    def dispatched(mode: RecomputeMode, *keep: SavedOp) -> float:
        return timed("short", nothing_hides, recompute=mode, keep=keep).causes[Cause.ep]

    twice = dispatched(RecomputeMode.none)
    assert dispatched(RecomputeMode.full) == pytest.approx(1.5 * twice)
    assert dispatched(RecomputeMode.selective, SavedOp.attention) == pytest.approx(1.5 * twice)
    assert dispatched(RecomputeMode.selective, SavedOp.exchange) == pytest.approx(twice)


@pytest.mark.parametrize("reshard", [True, False])
def test_traffic_of_fsdp_takes_as_long_as_the_bytes_that_the_plan_sends(reshard: bool) -> None:
    network = replace(H100.network, intra_seconds=0.0, inter_seconds=0.0)
    shown = replace(H100, network=network, overlap=replace(H100.overlap, dp=0.0))
    degrees, shape = LAYOUTS["fsdp"]
    plan = plan_from_shape(LARGE, degrees, shown, replace(shape, reshard_after_forward=reshard))
    assert shown.intra_node_bandwidth
    assert shown.inter_node_bandwidth
    # Eight ports of a node at most reach what is within it.
    within, between = shown.intra_node_bandwidth * network.ring_intra, 8 * shown.inter_node_bandwidth
    rate = min(within, between * network.ring_inter)
    found = timed("fsdp", shown, reshard_after_forward=reshard).causes[Cause.dp]
    # What lies outside of blocks is not freed: its second all-gather, which is counted here, is none.
    assert found == pytest.approx(plan.traffic.dp / rate, rel=1e-3)


def test_computing_hides_traffic_for_as_long_as_it_lasts() -> None:
    assert exposed(2.0, 0.75, 10.0) == 0.5
    assert exposed(2.0, 0.75, 1.0) == 1.0
    # Hidden traffic slows computing.
    assert exposed(2.0, 0.75, 10.0, cost=0.2) == pytest.approx(0.5 + 0.2 * 1.5)


def test_compiled_layers_and_fp8_are_faster_on_hopper_and_an_emulation_is_many_times_slower() -> None:
    assert timed("fsdp", compiled=True).seconds < timed("fsdp").seconds
    assert timed("fp8").seconds < timed("fp8", fp8=None).seconds
    emulated = timed("fp8", fp8=FP8Shape(emulated=True))
    assert emulated.seconds > 4 * timed("fp8", fp8=None).seconds


def test_a_slow_host_and_its_waits_count_as_host() -> None:
    """128 tokens per rank launch kernels for longer than these run."""
    waits = H100.kernels.sync_seconds * 32 * 59
    assert timed("short").causes[Cause.host] > 1.001 * waits
    assert timed("fp8").causes[Cause.host] == pytest.approx(waits, rel=1e-3)
    quick = replace(H100, kernels=replace(H100.kernels, launch_seconds=0.0, sync_seconds=0.0))
    assert timed("short", quick).causes[Cause.host] == 0
    # One wait per MoE layer and pass, and none without ep.
    syncs = replace(quick, kernels=replace(quick.kernels, sync_seconds=1e-3))
    assert timed("fp8", syncs).causes[Cause.host] == pytest.approx(32 * 59 * 1e-3)
    assert timed("fsdp", syncs).causes[Cause.host] == 0


def test_no_peaks_no_time_and_the_plan_says_what_gives_them() -> None:
    cpu = HardwareConfig("cpu", memory_bytes=2**40)
    assert step_time(SMALL, ParallelDims(), BF16, cpu) is None
    assert step_time(SMALL, ParallelDims(), replace(BF16, cpu_offload=True), H100) is None
    assert step_time(SMALL, ParallelDims(), BF16, HardwareConfig("x", peak_flops_bf16=1e15)) is None
    plan = plan_from_shape(SMALL, ParallelDims(), cpu, BF16)
    told = json.loads(json.dumps(plan.to_json()))
    assert told["time"] is told["mfu"] is told["tokens_per_second_per_gpu"] is None
    assert "python train.py task=calibrate" in format_plan(plan)
    # A file that tells peaks alone will do.
    peaks = HardwareConfig("x", memory_bandwidth=3e12, peak_flops_bf16=1e15, peak_flops_fp32=5e13)
    assert step_time(SMALL, ParallelDims(dp_shard=8), BF16, peaks) is None
    linked = replace(peaks, inter_node_bandwidth=5e10)
    assert step_time(SMALL, ParallelDims(dp_shard=8), BF16, linked) is not None


@pytest.mark.parametrize("hardware", named_hardware(), ids=lambda hardware: hardware.name)
def test_every_kind_of_gpu_has_a_time_in_bf16(hardware: HardwareConfig) -> None:
    found = timed("pp", hardware)
    rate = found.tokens_per_second_per_gpu
    assert 100 < rate < 6000
    assert found.source == f"assumed: conf/hardware/{hardware.name}.yaml"
    assert hardware.peak_flops_bf16
    assert 0.05 < rate * 260.6e9 / hardware.peak_flops_bf16 < 0.6


def test_a_plan_tells_its_time() -> None:
    degrees, shape = LAYOUTS["pp"]
    plan = plan_from_shape(LARGE, degrees, H100, shape)
    told = json.loads(json.dumps(plan.to_json()))
    assert plan.time is not None
    assert told["tokens_per_second_per_gpu"] == plan.time.tokens_per_second_per_gpu
    assert told["mfu"] == plan.mfu(FlopsConvention.causal)
    assert told["mfu"] == pytest.approx(told["tokens_per_second_per_gpu"] * 260.641652736e9 / 989.5e12)
    assert told["mfu_full_square"] > told["mfu"]
    assert list(told["time"]) == [
        "seconds",
        "tokens",
        "tokens_per_second",
        "causes",
        "gpu_hours_per_trillion_tokens",
        "days_per_trillion_tokens",
        "source",
    ]
    assert list(told["time"]["causes"]) == [cause.name for cause in Cause]
    text = format_plan(plan)
    assert f"{plan.time.tokens_per_second_per_gpu:,.0f} per rank, MFU {told['mfu']:.1%} causal" in text
    assert "assumed: conf/hardware/h100.yaml" in text
    largest = max(plan.time.causes, key=lambda cause: plan.time.causes[cause])  # type: ignore[union-attr]
    row = next(line for line in text.splitlines() if line.startswith(f"  {largest.value}"))
    assert row.endswith(f"{plan.time.causes[largest] / plan.time.seconds:.1%}")
