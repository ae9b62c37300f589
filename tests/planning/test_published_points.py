"""The back-test on published speeds: its points are those of the list, its page says what is predicted."""

import json
from dataclasses import replace

import pytest

from benchmarks import pages, planner
from benchmarks.published_points import Point, points
from dsv3.planning.hardware import preset_hardware
from dsv3.planning.layout import ParallelDims
from dsv3.planning.step_time import Cause, step_time

RATES = [1543, 1061, 1297, 4912, 6288, 3328, 1002, 865, 651, 859, 22528, 11550]
SECONDS = [0.6032, 1.1017, 4.1412, 0.4522, 0.7716, 2.7186, 0.3666, 0.6762, 2.7213, 0.2821, 0.4926, 1.7277]


@pytest.fixture(scope="module")
def rows() -> list[dict[str, object]]:
    return [planner.predict(point) for point in points()]


def test_every_published_point_is_there_and_every_second_configuration_is_held_back() -> None:
    found = points()
    assert [point.rate for point in found if point.rate] == RATES
    assert [point.seconds for point in found if point.seconds] == SECONDS
    assert sorted({point.configuration for point in found}) == list(range(1, 17))
    held_back = [point.configuration for point in found if point.held_back]
    assert held_back == [2, 4, 6, 8, 10, 12, *[14] * 3, *[16] * 3]
    for point in found:
        assert point.degrees.world_size in (8, 16, 256, 1024, 2048)
        assert not point.shape.layers or sum(point.shape.layers) == 61
        assert point.source


def test_the_page_and_the_results_say_what_is_predicted(rows: list[dict[str, object]]) -> None:
    """Run `python -m benchmarks.planner` after a change of the model or of an assumption."""
    told = json.loads(planner.RESULTS.read_text())
    for kind, found in planner.errors(rows).items():
        assert told["errors"][kind] == pytest.approx(found)
    assert [row["ratio"] for row in told["points"]] == pytest.approx([row["ratio"] for row in rows])
    page = (pages.DOCS / "planning.md").read_text()
    for lines in (planner.speed_table(rows), planner.error_table(planner.errors(rows))):
        assert "\n".join(lines) in page


def test_the_errors_are_as_small_as_the_page_claims(rows: list[dict[str, object]]) -> None:
    found = planner.errors(rows)
    assert found["set"]["median"] < 0.1
    assert found["set"]["worst"] < 0.25
    assert found["held back"]["median"] < 0.12
    assert found["all"]["points"] - found["all"]["within_a_quarter"] <= 1


def test_features_of_other_software_are_the_same_numbers_in_every_row() -> None:
    """A row has switches alone; no number of the hardware is its own."""
    for point in points():
        own, base = point.on(preset_hardware(point.hardware)), preset_hardware(point.hardware)
        launches = {own.kernels.launch_seconds, own.kernels.sync_seconds}
        assert own.kernels == base.kernels or (point.graphs and launches == {0.0})
        hidden = {"dp": base.overlap.dp, "ep": 1.0 if point.hides_dispatch else base.overlap.ep}
        if point.hides_nothing:
            hidden = {"dp": 0.0, "ep": 0.0, "pp": 0.0}
        assert own.overlap == replace(base.overlap, **hidden)
        assert (own.network, own.peak_flops_bf16) == (base.network, base.peak_flops_bf16)


def test_a_published_step_reduces_once_and_sends_a_copy_per_expert() -> None:
    slice_ = next(point for point in points() if point.configuration == 13)
    assert slice_.shape.fsdp_rounds(ParallelDims(dp_shard=8)) == (1, 0, 1)
    (level,) = slice_.shape.dispatch_levels(slice_.model_config.moe, slice_.degrees)
    assert (level.ranks, level.rows) == (8, 8)
    deduplicated = replace(slice_.shape, sends_copies=False)
    assert deduplicated.dispatch_levels(slice_.model_config.moe, slice_.degrees)[0].rows < 6
    hardware = slice_.on(preset_hardware("b200"))
    copies, once = (_ep(slice_, shape, hardware) for shape in (slice_.shape, deduplicated))
    assert once < copies


def _ep(point: Point, shape: object, hardware: object) -> float:
    found = step_time(point.model_config, point.degrees, shape, hardware)  # type: ignore[arg-type]
    assert found is not None
    return found.causes[Cause.ep]
