"""The pictures of a plan: what is drawn is what is planned, and files are written all or none."""

from pathlib import Path

import pytest
from matplotlib.collections import PolyCollection
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from dsv3.config.hardware import HardwareConfig
from dsv3.config.parallel import Schedule
from dsv3.metrics.plan_pictures import (
    GIB,
    draw_plan,
    memory_figure,
    memory_stacks,
    timeline_figure,
    write_pictures,
)
from dsv3.metrics.step_timeline import REST, step_picture
from dsv3.planning.memory import pipeline_memory
from dsv3.planning.plan import Plan, plan_from_shape
from tests.metrics.planned import plan_of_stages
from tests.planning.plans import plan_16b


def _words(figure: Figure) -> str:
    texts = [text.get_text() for axes in figure.axes for text in axes.texts]
    return "\n".join([*(text.get_text() for text in figure.texts), *texts])


@pytest.mark.parametrize("plan", [plan_of_stages(), plan_16b()], ids=["pipeline", "one stage"])
def test_the_bars_of_a_rank_sum_to_its_memory(plan: Plan) -> None:
    totals = [memory.total / GIB for memory in pipeline_memory(plan.model, plan.degrees, plan.shape)]
    stacks = memory_stacks(pipeline_memory(plan.model, plan.degrees, plan.shape))
    assert [sum(sizes) for sizes in zip(*stacks.values(), strict=True)] == pytest.approx(totals)
    figure = memory_figure(plan)
    (axes,) = figure.axes
    drawn = [0.0] * len(totals)
    for bar in axes.patches:
        assert isinstance(bar, Rectangle)
        rank = round(bar.get_y() + bar.get_height() / 2)
        assert bar.get_x() == pytest.approx(drawn[rank])  # on top of the one before
        drawn[rank] += bar.get_width()
    assert drawn == pytest.approx(totals)
    assert max(totals) == pytest.approx(plan.memory.total / GIB)
    (line,) = axes.lines
    assert line.get_path().get_extents().get_points()[:, 0].tolist() == [80e9 / GIB] * 2
    assert f"{max(totals):,.2f} GiB on the fullest rank" in _words(figure)


@pytest.mark.parametrize("schedule", [Schedule["1F1B"], Schedule.ZBVZeroBubble, Schedule.DualPipeV])
def test_the_spans_that_are_drawn_are_those_of_the_timeline(schedule: Schedule) -> None:
    plan = plan_of_stages(schedule)
    assert plan.time is not None
    figure = timeline_figure(plan, step_picture(plan.time.timeline, 10_000))
    (axes,) = figure.axes
    drawn: list[list[tuple[float, float]]] = [[] for _ in range(plan.degrees.pp)]
    for shapes in axes.collections:
        assert isinstance(shapes, PolyCollection)
        for path in shapes.get_paths():
            (left, bottom), (right, top) = path.get_extents().get_points()
            row = drawn[round((bottom + top) / 2)]
            row.append((left, right))
    planned = [[(span.start * 1e3, span.end * 1e3) for span in spans] for spans in plan.time.timeline]
    end = plan.time.seconds * 1e3
    for row, spans in zip(drawn, planned, strict=True):
        last = max(span[1] for spans in planned for span in spans)
        expected = sorted([*spans, (last, end)])  # the optimizer comes after the last rank's last pass
        assert sorted(row) == [pytest.approx(span, abs=1e-6 * end) for span in expected]
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert REST in legend
    assert "spans are drawn" not in _words(figure)


def test_of_a_step_with_many_spans_begin_and_end_are_drawn_and_the_picture_says_so() -> None:
    plan = plan_of_stages()
    assert plan.time is not None
    timeline = plan.time.timeline
    every = sum(map(len, timeline))
    picture = step_picture(timeline, every // 2)
    drawn = sum(len(row.spans) for row in picture.rows)
    left_out = sum(row.middle.spans for row in picture.rows if row.middle)
    assert drawn + left_out == every
    assert every // 2 <= drawn <= every // 2 + 2 * len(timeline)
    for row, spans in zip(picture.rows, timeline, strict=True):
        assert set(row.spans) <= set(spans)
        assert row.busy == pytest.approx(sum(span.end - span.start for span in spans))
        assert row.middle is not None
        hidden = [span for span in spans if span not in row.spans]
        assert (row.middle.start, row.middle.end) == (hidden[0].start, hidden[-1].end)
    assert {span.microbatch for row in picture.rows for span in row.spans} >= {0, 15}
    told = f"{drawn:,} of {every:,} spans are drawn"
    assert told in picture.told()
    assert told in _words(timeline_figure(plan, picture))
    assert len(timeline_figure(plan, picture).axes) == 2
    assert step_picture(timeline, every).told() == ""


def test_where_the_speed_is_unknown_the_memory_is_drawn_all_the_same() -> None:
    unknown = HardwareConfig(name="somegpu")
    plan = plan_of_stages()
    files, missing = draw_plan(plan_from_shape(plan.model, plan.degrees, unknown, plan.shape))
    assert list(files) == ["memory.png"]
    assert missing.startswith("no timeline: the speed of hardware somegpu is not known; name a GPU")


def test_an_empty_timeline_is_a_picture_too() -> None:
    picture = step_picture([[], []], 10)
    assert (picture.seconds, picture.told(), picture.microbatches) == (0.0, "", 0)
    assert [picture.idle(row) for row in picture.rows] == [0.0, 0.0]


def test_pictures_are_written_all_or_none(tmp_path: Path) -> None:
    files = {"memory.png": b"new", "timeline.png": b"new"}
    (tmp_path / "memory.png").write_bytes(b"old")
    (tmp_path / "timeline.png").mkdir()
    with pytest.raises(IsADirectoryError):
        write_pictures(tmp_path, files)
    assert (tmp_path / "memory.png").read_bytes() == b"old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["memory.png", "timeline.png"]
    (tmp_path / "timeline.png").rmdir()
    (tmp_path / "other").write_bytes(b"stays")
    written = write_pictures(tmp_path, files)
    assert [path.read_bytes() for path in written] == [b"new", b"new"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["memory.png", "other", "timeline.png"]
