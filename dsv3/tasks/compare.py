"""task=compare: sort the runs of a directory, such as a sweep's, by held-out loss; a table and a picture.

Reads only the files that the runs left, and imports no torch.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from io import StringIO
from pathlib import Path
from statistics import median
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table
from rich.text import Text

from dsv3.config.overrides import split_override
from dsv3.config.task import OutputFormat
from dsv3.errors import UserError
from dsv3.launch.job import Job
from dsv3.launch.run_dir import CONFIG_FILE, OVERRIDES_FILE
from dsv3.launch.sweep import FAILED_FILE, read_failure
from dsv3.metrics import jsonl
from dsv3.metrics.console import replace_control_characters
from dsv3.metrics.plots import plot_comparison
from dsv3.metrics.row import MetricsRow


class State(Enum):
    """Progress of a run; `stopped` is a run before its last step, one that is running included."""

    done = "done"
    stopped = "stopped"
    failed = "failed"
    no_evaluation = "no evaluation"


@dataclass
class RunSummary:
    """One run: its overrides, and the last values of its metrics (None: unknown)."""

    name: str
    """Path below the compared directory: the number of the job in a sweep."""
    directory: Path
    overrides: dict[str, str]
    """Values by key, as typed."""
    steps: int | None
    """train.steps."""
    failure: str
    """The error message of a run that failed, else empty."""
    rows: list[MetricsRow] = field(repr=False)
    """The rows of metrics.jsonl, one per step."""

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
        """Return the last held-out loss, in nats."""
        return next((row.evaluation_loss for row in self.rows[::-1] if row.evaluation_loss is not None), None)

    @property
    def tokens_per_second(self) -> float | None:
        """Throughput of all ranks together, the median over the steps."""
        rates = [row.tokens_per_second for row in self.rows if row.tokens_per_second is not None]
        return median(rates) if rates else None

    @property
    def state(self) -> State:
        """Return the state of the run by its files; a run at its last step is done whatever failed before."""
        if self.rows and self.step == self.steps:
            return State.done if self.held_out is not None else State.no_evaluation
        return State.failed if (self.directory / FAILED_FILE).exists() else State.stopped

    def format_overrides(self, keys: Sequence[str]) -> str:
        """Return the overrides of `keys` as they are typed, `KEY=VALUE KEY=VALUE`."""
        return " ".join(f"{key}={self.overrides[key]}" for key in keys if key in self.overrides)


class CompareTask:
    """Prints the runs below a directory, the best first, and draws their loss curves.

    With a `reference`, the table also has the largest relative difference of any step's training loss from
    that job's.
    """

    def __init__(
        self, runs: str, output: str | None, format: OutputFormat, reference: str | None = None
    ) -> None:
        self.directory = Path(runs)
        self.output = Path(output) if output is not None else self.directory / "compare.png"
        self.format = format
        self.reference = reference

    def run(self, job: Job) -> None:
        """Print to stdout, as a table or as one JSON object; nothing is written into a run's directory."""
        runs = find_runs(self.directory)
        keys = differing_overrides(runs)
        reference = None
        if self.reference is not None:
            reference = next((run for run in runs if run.name == self.reference), None)
            if reference is None:
                names = ", ".join(run.name for run in runs)
                raise UserError(
                    f"task.reference={self.reference} is none of the jobs of {self.directory}: {names}"
                )
        apart = [loss_differences(run, reference) if reference else [] for run in runs]
        farthest = [max((difference for _, difference in pairs), default=None) for pairs in apart]
        plot = self._draw(runs, keys, apart)
        if self.format is OutputFormat.json:
            entries = [_to_json(run, keys, value) for run, value in zip(runs, farthest, strict=True)]
            print(json.dumps({"runs": entries, "plot": plot and str(plot)}, indent=1))
            return
        print(_format_runs(runs, keys, farthest if reference else None))
        for run in runs:
            if run.failure:
                print(f"{run.name} failed: {replace_control_characters(run.failure)}")
        print(f"curves: {plot}" if plot else "no curves: no run has made a step")

    def _draw(
        self, runs: Sequence[RunSummary], keys: Sequence[str], apart: Sequence[list[tuple[int, float]]]
    ) -> Path | None:
        """Draw the runs that made a step, with their differences from the reference; return the file."""
        drawn = [(run, pairs) for run, pairs in zip(runs, apart, strict=True) if run.rows]
        if not drawn:
            return None
        curves = [(run.format_overrides(keys) or run.name, run.rows) for run, _ in drawn]
        title = f"Runs of {self.directory.absolute().name}"
        try:
            plot_comparison(curves, self.output, title, [pairs for _, pairs in drawn])
        except OSError as error:
            raise UserError(f"task.output={self.output} cannot be written: {error.strerror}") from None
        return self.output


def find_runs(directory: Path) -> list[RunSummary]:
    """Return the runs one or two folders below `directory`, the best held-out loss first.

    UserError where there are none.
    """
    if not directory.is_dir():
        raise UserError(f"task.runs={directory} is no directory: give one that holds runs, as multirun/ID")
    if _is_run_dir(directory):
        raise UserError(
            f"task.runs={directory} is one run: give the directory that holds it, {directory.parent}"
        )
    folders = [folder for level in ("*", "*/*") for folder in directory.glob(level) if _is_run_dir(folder)]
    if not folders:
        raise UserError(f"task.runs={directory} holds no runs: none of its folders has a {CONFIG_FILE}")
    folders.sort(key=_natural_order)
    runs = [_read_run(folder, str(folder.relative_to(directory))) for folder in folders]
    return sorted(runs, key=lambda run: (run.held_out is None, run.held_out or 0.0))


def differing_overrides(runs: Sequence[RunSummary]) -> list[str]:
    """Return the keys whose overrides differ between runs, or that some runs lack, in the order as typed.

    Leave out run.dir: a run's name already tells where it lies.
    """
    keys = dict.fromkeys(key for run in runs for key in run.overrides if key != "run.dir")
    return [key for key in keys if len({run.overrides.get(key) for run in runs}) > 1]


def loss_differences(run: RunSummary, reference: RunSummary) -> list[tuple[int, float]]:
    """Return (step, |loss - reference's| / |reference's|) of the steps that have a training loss in both."""
    losses = {row.step: row.loss for row in reference.rows}
    pairs = [(row.step, row.loss, losses.get(row.step)) for row in run.rows]
    return [(step, abs(loss - other) / abs(other)) for step, loss, other in pairs if loss and other]


def format_table(rows: Sequence[Sequence[str]], titles: Sequence[str], left_aligned: Sequence[str]) -> str:
    """Return rows of cells under their titles as plain text, the same on a terminal and in a pipe.

    Columns are right-aligned, as numbers are, except those named in `left_aligned`. No cell is cut or
    wrapped, so that a line can be searched.
    """
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for title in titles:
        table.add_column(Text(title), justify="left" if title in left_aligned else "right", no_wrap=True)
    for row in rows:
        table.add_row(*(Text(replace_control_characters(cell)) for cell in row))  # Text: no markup is parsed
    # Wider than any row: rich would fit the table to the terminal, or to 80 columns in a pipe.
    console = Console(file=StringIO(), color_system=None, width=10**9)
    with console.capture() as capture:
        console.print(table)
    return "\n".join(line.rstrip() for line in capture.get().rstrip("\n").split("\n"))


def _is_run_dir(folder: Path) -> bool:
    # A run has both files; wandb's folders, for one, have a config.yaml of their own.
    complete = (folder / CONFIG_FILE).is_file() and (folder / OVERRIDES_FILE).is_file()
    return complete or (folder / FAILED_FILE).is_file()


def _read_run(folder: Path, name: str) -> RunSummary:
    """Read a run's files; a file that is missing or damaged leaves its values unknown."""
    failure, failed_overrides = read_failure(folder)
    stored: Any = _read_yaml(folder / OVERRIDES_FILE)
    typed = [str(override) for override in stored] if isinstance(stored, list) else failed_overrides
    overrides = dict(pair for pair in map(split_override, typed) if pair)
    config: Any = _read_yaml(folder / CONFIG_FILE)
    try:
        steps = int(config["train"]["steps"])
    except (KeyError, TypeError, ValueError):
        steps = None
    return RunSummary(name, folder, overrides, steps, failure, jsonl.read_rows(folder / "metrics.jsonl"))


def _read_yaml(path: Path) -> object:
    """Return the content of a YAML file, None where it cannot be read."""
    try:
        return yaml.safe_load(path.read_text())
    except (OSError, ValueError, yaml.YAMLError):
        return None


def _natural_order(path: Path) -> list[tuple[int, str]]:
    """Return a sort key that puts job 10 after job 9."""
    return [(int(part), "") if part.isdecimal() else (0, part) for part in re.split(r"(\d+)", str(path))]


def _format_runs(
    runs: Sequence[RunSummary], keys: Sequence[str], farthest: Sequence[float | None] | None
) -> str:
    """Return the table of runs; `farthest` has the largest differences from a reference."""

    def known(value: float | None, form: str) -> str:
        return "-" if value is None else format(value, form)

    rows = [
        [
            run.name,
            run.format_overrides(keys),
            known(run.held_out, ".4f"),
            known(run.loss, ".4f"),
            f"{run.step}/{run.steps or '?'}",
            known(run.tokens_per_second, ",.0f"),
            run.state.value,
        ]
        for run in runs
    ]
    titles = ["job", "overrides", "held-out loss", "train loss", "steps", "tokens/s", "state"]
    if farthest is not None:
        titles.append("farthest")
        rows = [[*row, known(value, ".1e")] for row, value in zip(rows, farthest, strict=True)]
    return format_table(rows, titles, left_aligned=("job", "overrides", "state"))


def _to_json(run: RunSummary, keys: Sequence[str], farthest: float | None) -> dict[str, Any]:
    """Return the run's entry of the JSON object."""
    return {
        "job": run.name,
        "directory": str(run.directory),
        "overrides": {key: run.overrides[key] for key in keys if key in run.overrides},
        "evaluation_loss": run.held_out,
        "loss": run.loss,
        "step": run.step,
        "steps": run.steps,
        "tokens_per_second": run.tokens_per_second,
        "state": run.state.value,
        "reason": run.failure or None,
        "largest_difference": farthest,
    }
