"""The page of a step: its data are the timeline, it loads nothing, it stays small, and its script runs."""

import json
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dsv3.config.parallel import Schedule
from dsv3.config.strict import strict
from dsv3.launch.job import plan_job
from dsv3.metrics.step_timeline import step_picture
from dsv3.metrics.timeline_page import SPANS, TICKS, encode, timeline_page
from dsv3.planning.pipeline_timeline import Span
from tests.harness.composing import compose
from tests.metrics.planned import GPU, plan_of_stages

ROOT = Path(__file__).parents[2]

SCHEDULES = [Schedule["1F1B"], Schedule.InterleavedZeroBubble, Schedule.DualPipeV]


def data_of(page: str) -> dict[str, Any]:
    """Return what the script of a page reads."""
    (text,) = re.findall(r'<script id="data" type="application/json">(.*?)</script>', page)
    data: dict[str, Any] = json.loads(text)
    return data


def decode(data: dict[str, Any]) -> list[list[Span]]:
    """Return the spans that the data of a page hold, in ticks; the script of the page does the same."""
    rows = []
    for numbers in data["rows"]:
        now, spans = 0, []
        for shape, microbatch, gap in zip(*[iter(numbers)] * 3, strict=True):
            kind, stage, ticks = data["shapes"][shape]
            spans.append(Span(now + gap, now + gap + ticks, kind, stage, microbatch))
            now += gap + ticks
        rows.append(spans)
    return rows


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_data_of_a_page_are_the_timeline(schedule: Schedule) -> None:
    plan = plan_of_stages(schedule)
    assert plan.time is not None
    data = data_of(timeline_page(plan))
    tick = data["seconds"] / TICKS
    assert data["seconds"] == plan.time.seconds
    milliseconds, shares = (sum(values) for values in list(zip(*data["causes"], strict=True))[1:])
    assert (milliseconds, shares) == pytest.approx((plan.time.seconds * 1e3, 1))
    for spans, planned in zip(decode(data), plan.time.timeline, strict=True):
        assert [span[2:] for span in spans] == [span[2:] for span in planned]
        for span, own in zip(spans, planned, strict=True):
            assert (span.start * tick, span.end * tick) == pytest.approx((own.start, own.end), abs=tick)
    busy = [sum(span.end - span.start for span in planned) for planned in plan.time.timeline]
    assert data["idle"] == pytest.approx([1 - each / data["end"] for each in busy])


def test_a_page_loads_nothing_and_shows_what_is_typed_as_text() -> None:
    name = "</script><img src=x onerror=alert(1)>"
    page = timeline_page(plan_of_stages(hardware=replace(GPU, name=name, source=f"measured: {name}")))
    assert name not in page
    assert "&lt;/script&gt;&lt;img" in page
    assert page.count("</script>") == 2
    for loads in ("http", "//cdn", "src=", "<link", "@import", "url(", "import(", "fetch("):
        assert loads not in page.replace("&lt;img src=x", "")


def test_16_ranks_of_two_stages_with_500_microbatches_are_drawn_whole_and_below_a_megabyte() -> None:
    plan = plan_of_stages(Schedule.InterleavedZeroBubble, pp=16, microbatches=496, model="671b")
    page = timeline_page(plan)
    data = data_of(page)
    assert sum(len(row) for row in data["rows"]) == 3 * 16 * 2 * 3 * 496 < 3 * SPANS
    assert data["middles"] == [None] * 16
    assert len(page) < 600_000
    assert "spans are drawn" not in page


def test_beyond_its_bound_a_page_has_a_block_for_what_is_left_out() -> None:
    plan = plan_of_stages(microbatches=40)
    assert plan.time is not None
    picture = step_picture(plan.time.timeline, 100)
    data = encode(picture, plan.time.seconds)
    for numbers, middle, planned in zip(data["rows"], data["middles"], plan.time.timeline, strict=True):
        count, start, end, working = middle
        assert count + len(numbers) // 3 == len(planned) == 80
        assert 0 < working <= end - start < TICKS
    assert "of 320 spans are drawn" in picture.told()


def test_the_picture_of_the_documentation_is_that_of_its_command() -> None:
    """Write it again with that command where this fails."""
    page = (ROOT / "docs/planning.md").read_text().replace("\\\n", " ")
    (command,) = re.findall(r"python train.py (task=plan .* task.pictures=(docs/images/plan))\n", page)
    plan = plan_job(strict(compose(command[0].split())), []).plan
    assert (ROOT / command[1] / "timeline.html").read_text() == timeline_page(plan)
    assert "(docs/images/plan/timeline.png)" in (ROOT / "README.md").read_text()
    assert all((ROOT / command[1] / name).stat().st_size < 120_000 for name in ("memory.png", "timeline.png"))


STUB = """
const page = require("fs").readFileSync(0, "utf8");
const code = page.match(/<script>\\n([\\s\\S]*?)<\\/script>/)[1];
const data = page.match(/<script id="data"[^>]*>([\\s\\S]*?)<\\/script>/)[1];
let blocks = 0;
const element = (id) => ({
  style: {}, dataset: { view: "0 1" }, heard: {}, clientWidth: 1116,
  textContent: id === "data" ? data : "", append() {},
  addEventListener(name, act) { this.heard[name] = act; },
  insertRow() { return { insertCell: () => ({}) }; },
  getContext: () => ({ setTransform() {}, fillRect() { blocks++; }, fillText() {} }),
});
const all = {};
global.document = { getElementById: (id) => all[id] ??= element(id), createElement: element,
  querySelectorAll: () => [element("button")] };
global.window = { addEventListener() {}, innerWidth: 1200, devicePixelRatio: 1 };
global.requestAnimationFrame = (act) => act();
new Function(code + "; globalThis.own = { told, x, spans };")();
const found = own.spans.map((row) => row.map((span) => [span, own.told(own.x((span[0] + span[1]) / 2), 1)]));
const before = blocks;
all.canvas.heard.wheel({ preventDefault() {}, offsetX: 500, deltaY: -700 });
all.canvas.heard.mousemove({ offsetX: 300, offsetY: 60, clientX: 0, clientY: 0 });
console.log(JSON.stringify({ found: found[1], blocks: before, zoomed: blocks - before, tip: all.tip.style }));
"""


@pytest.mark.skipif(shutil.which("node") is None, reason="runs the page's script in node")
def test_the_script_of_a_page_tells_the_span_under_the_mouse() -> None:
    plan = plan_of_stages(Schedule.ZBVZeroBubble)
    command = ["node", "-e", STUB]
    ran = subprocess.run(command, input=timeline_page(plan), capture_output=True, text=True, check=True)
    told = json.loads(ran.stdout)
    assert plan.time is not None
    planned = plan.time.timeline[1]
    assert len(told["found"]) == len(planned)
    for ((_, _, kind, stage, microbatch), text), span in zip(told["found"], planned, strict=True):
        assert (kind, stage, microbatch) == span[2:]
        assert f"({kind})\npipeline rank 1, stage {stage}, microbatch {microbatch}\n" in text
        milliseconds = float(text.split("\n")[2].split(" ms")[0].replace(",", ""))
        assert milliseconds == pytest.approx((span.end - span.start) * 1e3, rel=1e-3)
    assert told["blocks"] >= sum(map(len, plan.time.timeline))
    assert 0 < told["zoomed"] < told["blocks"]
    assert told["tip"]["display"] == "block"
