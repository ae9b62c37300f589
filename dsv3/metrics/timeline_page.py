"""The timeline of a planned step as one HTML file, with details on hover; it loads nothing from elsewhere.

A canvas draws the spans; the wheel zooms, dragging moves, two clicks show all. The spans are three numbers
each in the page (`encode`), so that 16 pipeline ranks of two stages with 500 microbatches are about half a
MB. Beyond SPANS the begin and the end of the step are drawn, and one block stands for what is between.
"""

import html
import json
from typing import Any

from dsv3.metrics.step_timeline import (
    COLORS,
    KINDS,
    REST,
    REST_COLOR,
    StepPicture,
    layout_told,
    step_picture,
    step_told,
)
from dsv3.planning.plan import Plan

SPANS = 60_000
"""Most spans of a page: 16 ranks x 2 stages x 500 microbatches, with forward, inputs' and weights' passes."""

TICKS = 1_000_000
"""Times are whole numbers of this part of a step."""


def timeline_page(plan: Plan) -> str:
    """Return the page of a plan whose time is known."""
    time = plan.time
    assert time is not None
    picture = step_picture(time.timeline, SPANS)
    causes = sorted(time.causes.items(), key=lambda cause: -cause[1])
    shares = [[cause.value, seconds * 1e3, seconds / time.seconds] for cause, seconds in causes if seconds]
    total = max(time.seconds, picture.seconds)
    data = {
        "seconds": total,
        "end": picture.seconds,
        "ticks": TICKS,
        "kinds": [[kind, KINDS[kind], COLORS[kind]] for kind in KINDS],
        "rest": [REST, REST_COLOR],
        "causes": shares,
        **encode(picture, total),
    }
    title = f"Time of a step: {layout_told(plan)}"
    notes = [step_told(plan), picture.told()]
    # Numbers and names of ours alone: what was typed stands in the headings, escaped.
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    page = _PAGE.replace("@TITLE", html.escape(title))
    page = page.replace("@NOTES", html.escape(" · ".join(note for note in notes if note)))
    return page.replace("@DATA", text)


def encode(picture: StepPicture, seconds: float) -> dict[str, Any]:
    """Return the rows of a picture as plain data: what `rows` and `middles` of the page are.

    `shapes` are the distinct (kind, stage, ticks) of spans. A row lists for each of its spans three numbers:
    its shape, its microbatch, and the ticks since the end of the span before it. Where spans of a row are
    left out, `middles` has their number, where they begin and end, and how much of that is work.
    """
    scale = TICKS / seconds if seconds else 0.0
    shapes: dict[tuple[str, int, int], int] = {}
    rows: list[list[int]] = []
    middles: list[list[float] | None] = []
    for row in picture.rows:
        numbers: list[int] = []
        now = 0
        for span in row.spans:
            start, end = round(span.start * scale), round(span.end * scale)
            shape = shapes.setdefault((span.kind, span.stage, end - start), len(shapes))
            numbers += [shape, span.microbatch, start - now]
            now = end
        rows.append(numbers)
        left_out = row.middle
        times = [left_out.start, left_out.end, left_out.busy] if left_out is not None else []
        middles.append([left_out.spans, *(round(time * scale) for time in times)] if left_out else None)
    idle = [picture.idle(row) for row in picture.rows]
    return {"shapes": list(map(list, shapes)), "rows": rows, "middles": middles, "idle": idle}


_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>@TITLE</title>
<style>
body { margin: 20px; font: 14px/1.45 system-ui, sans-serif; color: #1f2933; }
h1 { font-size: 18px; margin: 0 0 2px; }
p, table, #legend { color: #52606d; margin: 2px 0 10px; }
canvas { width: 100%; display: block; cursor: crosshair; }
button { margin-right: 6px; }
td { padding: 0 14px 0 0; } td + td { text-align: right; }
i { display: inline-block; width: 11px; height: 11px; margin: 0 4px 0 12px; }
#tip { position: fixed; display: none; padding: 5px 9px; background: #1f2933; color: #fff; border-radius: 4px;
  pointer-events: none; white-space: pre; font-size: 13px; }
</style>
</head>
<body>
<h1>@TITLE</h1>
<p>@NOTES</p>
<div id="legend"></div>
<canvas id="canvas"></canvas>
<p><button data-view="0 1">whole step</button><button data-view="0 0.08">begin</button
><button data-view="0.92 1">end</button> the wheel zooms, dragging moves</p>
<table id="causes"></table>
<div id="tip"></div>
<script id="data" type="application/json">@DATA</script>
<script>
"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const canvas = document.getElementById("canvas"), tip = document.getElementById("tip");
const ink = canvas.getContext("2d"), LEFT = 52, RIGHT = 64, AXIS = 26;
const ROW = data.rows.length > 32 ? 14 : 24;
const kinds = Object.fromEntries(data.kinds.map(([kind, name, color]) => [kind, { name, color }]));
// Per rank the spans in the order of their starts: [start, end, kind, stage, microbatch], in ticks.
const spans = data.rows.map((numbers) => {
  const found = [];
  let now = 0;
  for (let i = 0; i < numbers.length; i += 3) {
    const [kind, stage, ticks] = data.shapes[numbers[i]], start = now + numbers[i + 2];
    now = start + ticks;
    found.push([start, now, kind, stage, numbers[i + 1]]);
  }
  return found;
});
const last = data.end / data.seconds * data.ticks;
let view = [0, data.ticks], pending = false;
const ms = (ticks) => ticks / data.ticks * data.seconds * 1e3;
const short = (value, digits = 4) => Number(value.toPrecision(digits)).toLocaleString("en");
const exact = (ticks) => short(ms(ticks), 7);
const width = () => canvas.clientWidth - LEFT - RIGHT;
const x = (tick) => LEFT + (tick - view[0]) / (view[1] - view[0]) * width();
const tick = (at) => view[0] + (at - LEFT) / width() * (view[1] - view[0]);

// The place of the first span that ends after `at`.
function first(row, at) {
  let low = 0, high = row.length;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (row[middle][1] <= at) low = middle + 1; else high = middle;
  }
  return low;
}

function block(rank, start, end, color) {
  const from = Math.max(x(start), LEFT), to = Math.min(x(end), LEFT + width());
  if (to <= from) return 0;
  ink.fillStyle = color;
  ink.fillRect(from, AXIS + rank * ROW + 1, Math.max(to - from - (to - from > 4 ? 1 : 0), 0.3), ROW - 3);
  return to - from;
}

function draw() {
  pending = false;
  const ratio = window.devicePixelRatio || 1, height = AXIS + ROW * spans.length + 4;
  canvas.style.height = height + "px";
  canvas.width = canvas.clientWidth * ratio;
  canvas.height = height * ratio;
  ink.setTransform(ratio, 0, 0, ratio, 0, 0);
  ink.font = "11px system-ui, sans-serif";
  ink.textBaseline = "middle";
  const span = ms(view[1]) - ms(view[0]), power = 10 ** Math.floor(Math.log10(span / 8));
  const step = power * [1, 2, 5, 10].find((factor) => factor * power >= span / 8);
  for (let at = Math.ceil(ms(view[0]) / step) * step; at <= ms(view[1]); at += step) {
    const place = x(at / 1e3 / data.seconds * data.ticks);
    ink.fillStyle = "#e4e7eb";
    ink.fillRect(place, 16, 1, height);
    ink.fillStyle = "#7b8794";
    ink.fillText(short(at) + " ms", place + 3, 9);
  }
  spans.forEach((row, rank) => {
    const middle = data.middles[rank];
    if (middle) block(rank, middle[1], middle[2], "#cbd2d9");
    block(rank, last, data.ticks, data.rest[1]);
    let drawn = -1;
    for (let i = first(row, view[0]); i < row.length && row[i][0] < view[1]; i++) {
      const [start, end, kind, , microbatch] = row[i];
      // What is narrower than a third of a dot is not drawn again on the same dot.
      if (x(end) - drawn < 0.3) continue;
      drawn = x(end);
      const wide = block(rank, start, end, kinds[kind].color);
      if (wide > 9 + 7 * String(microbatch).length && ROW > 16) {
        ink.fillStyle = "#fff";
        ink.fillText(microbatch, Math.max(x(start), LEFT) + 4, AXIS + rank * ROW + ROW / 2 - 0.5);
      }
    }
    ink.fillStyle = "#7b8794";
    ink.fillText(spans.length > 1 ? "pp " + rank : "rank", 4, AXIS + rank * ROW + ROW / 2 - 0.5);
    const idle = "idle " + Math.round(100 * data.idle[rank]) + " %";
    if (spans.length > 1) ink.fillText(idle, LEFT + width() + 6, AXIS + rank * ROW + ROW / 2 - 0.5);
  });
}

function redraw() {
  if (pending) return;
  pending = true;
  requestAnimationFrame(draw);
}

function show(from, to) {
  const wide = Math.min(Math.max(to - from, 20), data.ticks);
  const start = Math.min(Math.max(from, 0), data.ticks - wide);
  view = [start, start + wide];
  redraw();
}

// What lies under a place of the canvas, in words; "" for nothing.
function told(at, rank) {
  const row = spans[rank], now = tick(at), middle = data.middles[rank];
  if (!row || at < LEFT || at > LEFT + width()) return "";
  const found = row[first(row, now)], where = spans.length > 1 ? "pipeline rank " + rank : "rank";
  if (found && found[0] <= now) {
    const [start, end, kind, stage, microbatch] = found;
    return `${kinds[kind].name} (${kind})\\n${where}, stage ${stage}, microbatch ${microbatch}\\n`
      + `${short(ms(end - start))} ms, from ${exact(start)} to ${exact(end)} ms`;
  }
  if (middle && middle[1] <= now && now < middle[2]) {
    const busy = Math.round(100 * middle[3] / (middle[2] - middle[1]));
    const count = middle[0].toLocaleString("en");
    return `${count} spans, not drawn one by one\\n${where} works ${busy} % of the time`;
  }
  if (now >= last) return `${data.rest[0]}\\n${short(ms(data.ticks - last))} ms`;
  const before = row[first(row, now) - 1], from = before ? before[1] : 0, to = found ? found[0] : last;
  return `idle\\n${where}\\n${short(ms(to - from))} ms, from ${exact(from)} to ${exact(to)} ms`;
}

let dragged = null;
canvas.addEventListener("mousemove", (event) => {
  if (dragged) {
    const moved = (dragged.x - event.offsetX) / width() * (dragged.view[1] - dragged.view[0]);
    show(dragged.view[0] + moved, dragged.view[1] + moved);
    return;
  }
  const text = told(event.offsetX, Math.floor((event.offsetY - AXIS) / ROW));
  tip.textContent = text;
  tip.style.display = text ? "block" : "none";
  tip.style.left = Math.min(event.clientX + 14, window.innerWidth - 300) + "px";
  tip.style.top = event.clientY + 16 + "px";
});
canvas.addEventListener("mouseleave", () => { tip.style.display = "none"; dragged = null; });
canvas.addEventListener("mousedown", (event) => { dragged = { x: event.offsetX, view: [...view] }; });
window.addEventListener("mouseup", () => { dragged = null; });
canvas.addEventListener("dblclick", () => show(0, data.ticks));
canvas.addEventListener("wheel", (event) => {
  event.preventDefault();
  const at = tick(event.offsetX), factor = Math.exp(event.deltaY * 0.002);
  show(at - (at - view[0]) * factor, at + (view[1] - at) * factor);
}, { passive: false });
for (const button of document.querySelectorAll("button")) {
  const [from, to] = button.dataset.view.split(" ").map(Number);
  button.addEventListener("click", () => show(from * data.ticks, to * data.ticks));
}
const used = new Set(data.shapes.map((shape) => shape[0]));
const named = data.kinds.filter(([kind]) => used.has(kind));
if (data.end < data.seconds) named.push(["", ...data.rest]);
for (const [, name, color] of named) {
  const legend = document.getElementById("legend"), mark = document.createElement("i");
  mark.style.background = color;
  legend.append(mark, name);
}
for (const [name, milliseconds, share] of data.causes) {
  const row = document.getElementById("causes").insertRow();
  for (const text of [name, short(milliseconds) + " ms", (100 * share).toFixed(1) + " %"]) {
    row.insertCell().textContent = text;
  }
}
window.addEventListener("resize", redraw);
redraw();
</script>
</body>
</html>
"""
