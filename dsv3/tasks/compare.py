"""What the runs of a directory have come to, by the files they left; imports no torch.

task=compare: the runs of a sweep by held-out loss, as a table and a picture; imports no torch.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from statistics import median
from typing import Any

import yaml

from dsv3.config.overrides import split_override
from dsv3.config.task import PlanFormat
from dsv3.errors import UserError
from dsv3.launch.job import Job
from dsv3.launch.run_dir import CONFIG_FILE, OVERRIDES_FILE
from dsv3.launch.sweep import FAILED_FILE, read_failure
from dsv3.metrics import jsonl
from dsv3.metrics.console import visible
from dsv3.metrics.plots import comparison
from dsv3.metrics.row import MetricsRow


class State(Enum):
    """How far a run has come; `stopped` is any that is not at its last step, a running one too."""

    done = "done"
    stopped = "stopped"
    failed = "failed"
    no_evaluation = "no evaluation"


@dataclass
class RunSummary:
    """One run: what it was told, and its last figures (None: unknown)."""

    directory: Path
    overrides: dict[str, str]
    steps: int | None
    reason: str
    rows: list[MetricsRow] = field(repr=False)

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return self.rows[-1].step if self.rows else 0

    @property
    def loss(self) -> float | None:
        """Training loss of the last step, in nats."""
        return self.rows[-1].loss if self.rows else None

    @property
    def held_out(self) -> float | None:
        """The last held-out loss, in nats."""
        return next((row.evaluation_loss for row in self.rows[::-1] if row.evaluation_loss is not None), None)

    @property
    def tokens_per_second(self) -> float | None:
        """Median over the steps, of all ranks together."""
        rates = [row.tokens_per_second for row in self.rows if row.tokens_per_second is not None]
        return median(rates) if rates else None

    @property
    def state(self) -> State:
        """Whether the run has reached its end, and with a held-out loss."""
        if self.rows and self.step == self.steps:
            return State.done if self.held_out is not None else State.no_evaluation
        return State.failed if (self.directory / FAILED_FILE).exists() else State.stopped


def find_runs(directory: Path) -> list[RunSummary]:
    """The runs one or two folders below `directory`, best held-out loss first; UserError without any."""
    if not directory.is_dir():
        raise UserError(f"task.runs={directory} is no directory: give one that holds runs, as multirun/ID")
    if _is_run(directory):
        raise UserError(
            f"task.runs={directory} is one run: give the directory that holds it, {directory.parent}"
        )
    found = [folder for level in ("*", "*/*") for folder in directory.glob(level) if _is_run(folder)]
    if not found:
        raise UserError(f"task.runs={directory} holds no runs: none of its folders has a {CONFIG_FILE}")
    runs = [_read(folder) for folder in sorted(found, key=_natural)]
    return sorted(runs, key=lambda run: (run.held_out is None, run.held_out or 0.0))


def distinguishing(runs: Sequence[RunSummary]) -> list[str]:
    """The keys that not every run was told, or not the same value, in the order they were typed.

    Where a run lies is told by its name.
    """
    keys = dict.fromkeys(key for run in runs for key in run.overrides if key != "run.dir")
    return [key for key in keys if len({run.overrides.get(key) for run in runs}) > 1]


def differences(run: RunSummary, reference: RunSummary) -> list[tuple[int, float]]:
    """Step and |loss - reference's| / |reference's|, of the steps in which both have a training loss."""
    losses = {row.step: row.loss for row in reference.rows}
    pairs = [(row.step, row.loss, losses.get(row.step)) for row in run.rows]
    return [(step, abs(loss - other) / abs(other)) for step, loss, other in pairs if loss and other]


def largest(found: Sequence[tuple[int, float]]) -> float | None:
    """The largest difference, None without any."""
    return max((difference for _, difference in found), default=None)


def _is_run(folder: Path) -> bool:
    # A run has both files; wandb's folders, for one, have a config.yaml of their own.
    whole = (folder / CONFIG_FILE).is_file() and (folder / OVERRIDES_FILE).is_file()
    return whole or (folder / FAILED_FILE).is_file()


def _read(folder: Path) -> RunSummary:
    reason, failed = read_failure(folder)
    overrides: Any = _yaml(folder / OVERRIDES_FILE)
    typed = [str(override) for override in overrides] if isinstance(overrides, list) else failed
    pairs = dict(pair for pair in map(split_override, typed) if pair)
    config: Any = _yaml(folder / CONFIG_FILE)
    try:
        steps = int(config["train"]["steps"])
    except (KeyError, TypeError, ValueError):
        steps = None
    return RunSummary(folder, pairs, steps, reason, jsonl.read(folder / "metrics.jsonl"))


def _yaml(path: Path) -> object:
    try:
        return yaml.safe_load(path.read_text())
    except (OSError, ValueError, yaml.YAMLError):
        return None


def _natural(path: Path) -> list[tuple[int, str]]:
    """An order in which job 10 comes after job 9."""
    return [(int(part), "") if part.isdecimal() else (0, part) for part in re.split(r"(\d+)", str(path))]


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
