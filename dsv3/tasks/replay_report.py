"""Tell what a replay has found: a table for people on stderr, one JSON object on stdout for programs."""

import json
import shlex
from typing import Any

from dsv3.config.registry import command
from dsv3.launch.replayed_run import ReplayedRun
from dsv3.metrics.accident_journal import plain
from dsv3.metrics.console import Console, format_table
from dsv3.tasks.replay_verdict import (
    COMPARED,
    REPEATS,
    ComparedStep,
    Setup,
    Verdict,
    find_accident,
    judge,
)
from dsv3.training.gradient_places import Place

LISTED = 12
"""Steps that the table shows, the one that is asked for last; the JSON has MOST_TOLD."""

MOST_TOLD = 1000


class Found:
    """The findings of a replay, for the table and the JSON."""

    def __init__(
        self,
        run: ReplayedRun,
        steps: list[ComparedStep],
        entry: dict[str, Any] | None,
        setup: Setup,
        samples: tuple[int, int],
        places: list[Place],
    ) -> None:
        self.run, self.steps, self.setup = run, steps, setup
        self.samples, self.places = samples, places
        self.accident = find_accident(steps[-1], entry)
        self.verdict: Verdict = judge(steps, self.accident, setup)

    def to_json(self) -> dict[str, Any]:
        """Return the object of stdout's last line."""
        last, place = self.steps[-1], self.places[0] if self.places else None
        checkpoint = self.run.checkpoint
        return {
            "verdict": self.verdict.outcome,
            "cause": self.verdict.cause,
            "run": str(self.run.directory),
            "step": self.run.step,
            "checkpoint": None if checkpoint is None else str(checkpoint),
            "samples": list(self.samples),
            "accident": self.accident,
            **{name: self._told(last, name) for name in COMPARED[:2]},
            "layer": place.layer if place else None,
            "parameter": place.name if place else None,
            "expert": place.expert if place else None,
            "parameters": [each.name for each in self.places],
            "first_difference": self.verdict.first_difference,
            "repeats_exactly": self.setup.repeats_exactly,
            "differs": dict(self.setup.differs),
            "precision": {"run": self.setup.run_precision, "here": self.setup.precision},
            "steps": [
                {"step": each.step, "skipped": each.replayed is None}
                | {name: self._told(each, name) for name in COMPARED[:2]}
                for each in self.steps[-MOST_TOLD:]
            ],
        }

    @staticmethod
    def _told(step: ComparedStep, name: str) -> dict[str, Any]:
        """Return a column of a step: in the run, here, and their difference."""
        return {
            "run": None if step.recorded is None else getattr(step.recorded, name),
            "here": None if step.replayed is None else step.replayed.get(name),
            "difference": step.difference(name),
            "relative": step.relative(name),
        }

    def table(self) -> str:
        """Return the steps beside their records, of many the last ones and the first that differs."""
        shown = [
            each
            for each in self.steps
            if each.step > self.run.step - LISTED or each.step == self.verdict.first_difference
        ]
        rows = []
        for each in shown:
            cells = [f"{each.step}"]
            for name in COMPARED[:2]:
                told = self._told(each, name)
                cells += [_number(told["run"], "none"), _number(told["here"], "skipped")]
                cells.append(_number(told["difference"], "", "g"))
            rows.append(cells)
        titles = ["step", "loss", "here", "difference", "grad norm", "here ", "difference "]
        return format_table(rows, titles, [])


def _number(value: float | None, absent: str, form: str = "f") -> str:
    """Return a number of the table."""
    if value is None:
        return absent
    return f"{value:.3g}" if form == "g" else f"{value:.6g}"


def tell(found: Found, texts: list[str]) -> None:
    """Print the table to stderr and the JSON to stdout."""
    console, run = Console(stderr=True), found.run
    for line in found.table().splitlines():
        console.message(line)
    for line in texts:
        console.message(line)
    begin = "the run's begin" if run.checkpoint is None else run.checkpoint.name
    first, end = found.samples
    rows = [
        ("run", str(run.directory)),
        ("step", f"{run.step:,}, from {begin}"),
        ("sequences", f"{first:,} to {end - 1:,}"),
        ("accident", _accident(found.accident)),
    ]
    if found.places:
        names = [place.name for place in found.places]
        rows.append(
            ("gradient", f"{'largest' if found.steps[-1].is_finite else 'not finite'}: {', '.join(names)}")
        )
    rows += [
        ("not as in the run", f"{key}: {pair[0]} -> {pair[1]}") for key, pair in found.setup.differs.items()
    ]
    rows += [("verdict", found.verdict.outcome), ("cause", found.verdict.cause)]
    console.table("Replay", rows)
    following = _next(found) if found.accident is not None else []
    if following:
        console.next_command(shlex.join(following))
    console.close()
    print(json.dumps(plain(found.to_json())), flush=True)


def _accident(entry: dict[str, Any] | None) -> str:
    """Return the accident of the run in a few words."""
    if entry is None:
        return "none recorded"
    named = next((entry[key] for key in ("parameter", "layer") if entry.get(key)), None)
    return f"{entry['kind']}{f' in {named}' if named else ''}"


def _next(found: Found) -> list[str]:
    """Return the command that tells more of an accident, if any: in fp32, in the run's own, with its text."""
    words = [
        *command("train"),
        "task=replay",
        f"task.run={found.run.directory}",
        f"task.step={found.run.step}",
    ]
    if found.verdict.outcome == REPEATS:
        return [*words, "task.text=400" if found.setup.precision == "fp32" else "precision=fp32"]
    return words if found.setup.precision != found.setup.run_precision else []
