"""What a search leaves open: typed choices stay, batches suit the ranks, and the smallest world fits."""

from dataclasses import replace

import pytest

from dsv3.config.parallel import DegreesConfig, RecomputeMode, Schedule
from dsv3.errors import UserError
from dsv3.launch import layout_choice
from dsv3.launch.layout_choice import TOKENS_PER_STEP, Request, smallest_world
from dsv3.planning.layout_search import LayoutSearch
from dsv3.planning.layout_space import Choices, LayoutSpace
from tests.harness.composing import strict_config


def request(*overrides: str, model: str = "debug") -> Request:
    """Return the request of a command with these overrides."""
    typed = {override.partition("=")[0]: override for override in overrides}
    parallel = typed["parallel"].partition("=")[2] if "parallel" in typed else None
    config = strict_config([*overrides, f"model={model}", "task=search"])
    return Request(config, {**typed, "model": f"model={model}"}, model, parallel)


def choices(*overrides: str, hardware: str = "h800") -> Choices:
    return request(*overrides, f"hardware={hardware}").space(8).choices


def test_nothing_typed_leaves_all_open() -> None:
    found = choices()
    assert (found.axes, found.least, found.schedule, found.recompute) == ({}, {}, None, None)
    assert (found.stages_per_rank, found.reshard, found.microbatch_size) == (None, None, None)


def test_what_is_typed_stays() -> None:
    assert choices("parallel.degrees.tp=2").axes == {"tp": 2}
    assert choices("parallel.schedule=DualPipeV").schedule is Schedule.DualPipeV
    assert choices("recompute=full").recompute is RecomputeMode.full
    assert choices("recompute.mode=selective").recompute is RecomputeMode.selective
    assert choices("train.microbatch_size=4").microbatch_size == 4
    assert choices("parallel.reshard_after_forward=false").reshard is False
    assert list(choices("precision=fp32").precisions) == [""]
    assert choices("precision.compute=fp32").precisions[""].compute.name == "fp32"


def test_a_typed_preset_splits_its_own_axes_and_no_others() -> None:
    pipeline, replicas, tensor = (choices(f"parallel={name}") for name in ("pp", "hsdp", "tp_ep"))
    assert pipeline.least["pp"] == replicas.least["dp_replicate"] == tensor.least["tp"] == 2
    assert pipeline.axes == {"dp_replicate": 1, "cp": 1, "tp": 1}
    assert replicas.axes == {"pp": 1, "cp": 1, "tp": 1}
    assert set(choices("parallel=none").axes.values()) == {1}
    # A degree that is typed beside it counts more.
    assert choices("parallel=hsdp", "parallel.degrees.tp=4").axes == {"pp": 1, "cp": 1, "tp": 4}


def test_the_only_axis_of_a_preset_of_the_user_s_splits_something() -> None:
    own = request("parallel=hsdp", "hardware=h800")
    degrees = DegreesConfig(dp_replicate="auto")
    found = replace(own, config=replace(own.config, parallel=replace(own.config.parallel, degrees=degrees)))
    assert found.space(8).choices.least["dp_replicate"] == 2


@pytest.mark.parametrize(("hardware", "formats"), [("h800", ["bf16", "fp8"]), ("b200", ["bf16"])])
def test_formats_that_the_device_multiplies_are_tried(hardware: str, formats: list[str]) -> None:
    """PyTorch multiplies FP8 by blocks on Hopper alone: a Blackwell's peak does not count."""
    assert list(choices(hardware=hardware).precisions) == formats


def test_the_batch_of_a_report_suits_the_ranks() -> None:
    large = request(model="671b")
    assert large.batch(1024)[0] == 15360
    sequences, source = large.batch(28)
    assert (sequences, source.rpartition(", ")[2]) == (16128, "rounded up to suit the ranks")
    # 3 x 2^13 ranks are not all data parallel: the batch would grow by half.
    assert large.batch(24576)[0] == 15360
    assert large.with_length(8192).batch(1024)[0] == 7680
    assert request("train.global_batch_size=100").batch(28) == (100, "as typed")
    small = request()
    assert small.batch(1) == (TOKENS_PER_STEP // small.length(), f"about {TOKENS_PER_STEP:,} tokens")


@pytest.mark.parametrize(("model", "world"), [("671b", 136), ("16b", 7), ("debug", 7), ("671b", 1100)])
def test_an_odd_world_has_room_for_larger_microbatches(model: str, world: int) -> None:
    """Else each rank would have an odd number of sequences, which only microbatches of one take."""
    own = request(model=model)
    batch, _ = own.batch(world)
    assert batch % world == 0
    assert batch // world % 2 == 0
    assert own.batch(8)[0] <= batch <= 1.1 * own.batch(8)[0]


def test_a_typed_schedule_asks_for_pipelines() -> None:
    assert choices("parallel.schedule=DualPipeV").least["pp"] == 2


def test_what_has_no_predicted_speed_is_refused() -> None:
    with pytest.raises(UserError, match=r"cpu_offload=true has no predicted speed"):
        choices("parallel=fsdp", "parallel.fsdp.cpu_offload=true")
    with pytest.raises(UserError, match="hardware=cpu has no known speed"):
        choices(hardware="cpu")
    # Where this machine was measured for other ranks, the error says so.
    own = request("hardware=cpu")
    hardware = replace(own.config.hardware, source="assumed; a.yaml was measured on ranks 1, not on ranks 8")
    with pytest.raises(UserError, match=r"a\.yaml was measured on ranks 1"):
        replace(own, config=replace(own.config, hardware=hardware)).space(8)


def test_a_backend_is_tried_where_it_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dsv3.planning.checks.importlib.util.find_spec", lambda name: name)
    deepep = ("parallel=tp_ep", "parallel.degrees.tp=1", "parallel.expert.backend=deepep")

    def sizes(precision: str) -> set[int]:
        space: LayoutSpace = request(*deepep, "hardware=h800", f"precision={precision}").space(8)
        return {cell.ep for cell in space.cells()}

    assert max(sizes("bf16")) > 1
    assert sizes("fp32") == {1}


def test_the_smallest_world_is_the_first_that_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layout_choice, "MOST_RANKS", 16)
    few = ("recompute=full", "precision=bf16", "train.microbatch_size=1", "train.global_batch_size=16")
    whole = request(*few, "hardware=h800")
    found = LayoutSearch(whole.space(2)).least_memory()
    assert found is not None

    def within(room: int) -> Request:
        return replace(
            whole, config=replace(whole.config, hardware=replace(whole.config.hardware, memory_bytes=room))
        )

    assert smallest_world(within(found[1].total)) == 2
    larger = smallest_world(within(found[1].total - 1))
    assert larger is not None
    assert larger > 2
    assert smallest_world(within(1)) is None
