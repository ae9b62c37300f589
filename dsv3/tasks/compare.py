"""task=compare: the runs of a sweep by held-out loss, as a table and a picture; imports no torch."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dsv3.metrics.comparison import comparison
from dsv3.metrics.console import visible
from dsv3.runtime.errors import UserError
from dsv3.runtime.job import Job
from dsv3.tasks.config import PlanFormat
from dsv3.tasks.runs import RunSummary, differences, distinguishing, find_runs, largest

_TITLES = ("job", "overrides", "held-out loss", "train loss", "steps", "tokens/s", "state")
_FARTHEST = "farthest"
_TEXTS = ("job", "overrides", "state")


class Compare:
    """Prints the runs below a directory, the best first, and draws their curves beside them.

    With a `reference`, also the largest relative difference of any step's training loss from that job's.
    """

    def __init__(
        self, runs: str, output: str | None, format: PlanFormat, reference: str | None = None
    ) -> None:
        self.runs = Path(runs)
        self.output = Path(output) if output is not None else self.runs / "compare.png"
        self.format = format
        self.reference = reference

    def run(self, job: Job) -> None:
        """Print to stdout, as a table or as one JSON object; nothing is written into a run's directory."""
        found = find_runs(self.runs)
        keys = distinguishing(found)
        reference = self._reference(found)
        farthest = [largest(differences(run, reference)) if reference else None for run in found]
        picture = self._draw(found, keys, reference)
        if self.format is PlanFormat.json:
            print(json.dumps(_json(found, keys, self.runs, picture, farthest), indent=1))
            return
        cells = [_cells(run, keys, self.runs) for run in found]
        if reference:
            for row, value in zip(cells, farthest, strict=True):
                row.append("-" if value is None else f"{value:.1e}")
        print(table(cells, _TITLES + ((_FARTHEST,) if reference else ())))
        for run in found:
            if run.reason:
                print(f"{_name(run, self.runs)} failed: {visible(run.reason)}")
        print(f"curves: {picture}" if picture else "no curves: no run has made a step")

    def _reference(self, found: Sequence[RunSummary]) -> RunSummary | None:
        if self.reference is None:
            return None
        names = {_name(run, self.runs): run for run in found}
        if self.reference not in names:
            raise UserError(
                f"task.reference={self.reference} is none of the jobs of {self.runs}: {', '.join(names)}"
            )
        return names[self.reference]

    def _draw(
        self, found: Sequence[RunSummary], keys: Sequence[str], reference: RunSummary | None
    ) -> Path | None:
        curves = [(_told(run, keys) or _name(run, self.runs), run.rows) for run in found if run.rows]
        if not curves:
            return None
        try:
            apart = [differences(run, reference) if reference else [] for run in found if run.rows]
            comparison(curves, self.output, f"Runs of {self.runs.absolute().name}", apart)
        except OSError as error:
            raise UserError(f"task.output={self.output} cannot be written: {error.strerror}") from None
        return self.output


def table(rows: Sequence[Sequence[str]], titles: Sequence[str] = _TITLES) -> str:
    """The rows under their titles, texts to the left and numbers to the right."""
    widths = [max(map(len, column)) for column in zip(titles, *rows, strict=True)]
    lines = []
    for row in (titles, *rows):
        pairs = zip(titles, row, widths, strict=True)
        cells = [text.ljust(width) if title in _TEXTS else text.rjust(width) for title, text, width in pairs]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def _cells(run: RunSummary, keys: Sequence[str], runs: Path) -> list[str]:
    rate = run.tokens_per_second
    return [
        visible(_name(run, runs)),
        visible(_told(run, keys)),
        _number(run.held_out),
        _number(run.loss),
        f"{run.step}/{run.steps or '?'}",
        "-" if rate is None else f"{rate:,.0f}",
        run.state.value,
    ]


def _json(
    found: Sequence[RunSummary],
    keys: Sequence[str],
    runs: Path,
    picture: Path | None,
    farthest: Sequence[float | None],
) -> dict[str, Any]:
    entries = [
        {
            "job": _name(run, runs),
            "directory": str(run.directory),
            "overrides": {key: run.overrides[key] for key in keys if key in run.overrides},
            "evaluation_loss": run.held_out,
            "loss": run.loss,
            "step": run.step,
            "steps": run.steps,
            "tokens_per_second": run.tokens_per_second,
            "state": run.state.value,
            "reason": run.reason or None,
            "largest_difference": difference,
        }
        for run, difference in zip(found, farthest, strict=True)
    ]
    return {"runs": entries, "plot": picture and str(picture)}


def _name(run: RunSummary, runs: Path) -> str:
    return str(run.directory.relative_to(runs))


def _told(run: RunSummary, keys: Sequence[str]) -> str:
    return " ".join(f"{key}={run.overrides[key]}" for key in keys if key in run.overrides)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
