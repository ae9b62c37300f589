"""The runs of a directory, such as a sweep's, as their files tell them: overrides, losses, state, table.

task=compare prints them, and so does the end of a sweep.
"""

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from statistics import median
from typing import Any

from dsv3.checkpoint.directory import CONFIG_FILE
from dsv3.checkpoint.training_record import sound_changes
from dsv3.config.convergence import ABSENT, Kind, differences, flatten, shown
from dsv3.config.overrides import split_override
from dsv3.config.upgrade import upgrade_node
from dsv3.errors import UserError
from dsv3.launch.held_out import HeldOutData, differing, held_out_data
from dsv3.launch.run_dir import OVERRIDES_FILE, read_environment
from dsv3.launch.sweep import FAILED_FILE, read_failure
from dsv3.metrics import jsonl
from dsv3.metrics.console import format_table
from dsv3.metrics.progress import phase
from dsv3.metrics.row import MetricsRow
from dsv3.untrusted_files import BadFile, MissingFile, read_yaml

_NAMED = 3
"""Runs that a message names for each value."""


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
    config: dict[str, Any] = field(default_factory=dict, repr=False)
    """The whole resolved config, by today's names; empty where it cannot be read."""
    environment: dict[str, Any] = field(default_factory=dict, repr=False)
    """The content of environment.json."""
    damage: list[str] = field(default_factory=list, repr=False)
    """What is wrong with files that cannot be read; their values are unknown."""

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
    def planned_tokens_per_second(self) -> float | None:
        """Throughput that the plan says of the last step's batch; None for hardware of unknown speed."""
        return self.rows[-1].planned_tokens_per_second if self.rows else None

    @property
    def memory_gib(self) -> float | None:
        """Peak memory of the busiest rank."""
        return max((row.memory_gib for row in self.rows if row.memory_gib is not None), default=None)

    @property
    def planned_memory_gib(self) -> float | None:
        """Peak memory that the plan says of the last step."""
        return self.rows[-1].planned_memory_gib if self.rows else None

    @property
    def state(self) -> State:
        """Return the state of the run by its files.

        A run that was evaluated at its last step is done whatever failed before. One that reached its last
        step with a nonfinite loss has left a failure.
        """
        at_end = bool(self.rows) and self.step == self.steps
        if at_end and self.rows[-1].evaluation_loss is not None:
            return State.done
        if (self.directory / FAILED_FILE).exists():
            return State.failed
        if not at_end:
            return State.stopped
        return State.done if self.held_out is not None else State.no_evaluation

    @property
    def convergence(self) -> str | None:
        """Return the hash that runs share which learn the same; None for a run of older code."""
        return self.environment.get("convergence")

    @property
    def data_changes(self) -> list[dict[str, Any]]:
        """Return the changes of its data that the run was told to go on with."""
        data = self.environment.get("data")
        return sound_changes(data.get("changes")) if isinstance(data, dict) else []

    @property
    def held_out_data(self) -> HeldOutData:
        """Return what decides on which tokens the held-out loss is measured."""
        data = self.environment.get("data")
        told = data if isinstance(data, dict) else {}
        fingerprints = (told.get("fingerprint"), told.get("tokenizer_fingerprint"))
        rows = told.get("rows_held_out"), told.get("rows_evaluated")
        return held_out_data(self.config, *fingerprints, *rows, told.get("row_order", 1))

    def format_overrides(self, keys: Sequence[str]) -> str:
        """Return the overrides of `keys` as they are typed, `KEY=VALUE KEY=VALUE`."""
        return " ".join(f"{key}={self.overrides[key]}" for key in keys if key in self.overrides)


def find_runs(directory: Path) -> list[RunSummary]:
    """Return the runs one or two folders below `directory`, the best held-out loss first.

    UserError where there are none.
    """
    if not directory.is_dir():
        raise UserError(f"task.runs={directory} is no directory: give one that holds runs, as multirun/ID")
    if _is_run_dir(directory):
        raise UserError(f"task.runs={directory} is one run: {_where_to_compare(directory.absolute().parent)}")
    folders = [folder for level in ("*", "*/*") for folder in directory.glob(level) if _is_run_dir(folder)]
    if not folders:
        raise UserError(f"task.runs={directory} holds no runs: none of its folders has a {CONFIG_FILE}")
    folders.sort(key=_natural_order)
    runs = []
    with phase(f"reading {directory}", len(folders), "runs") as work:
        for folder in folders:
            runs.append(read_run(folder, str(folder.relative_to(directory))))
            work.advance()
    return sorted(runs, key=lambda run: (run.held_out is None, run.held_out or 0.0))


def _where_to_compare(parent: Path) -> str:
    """Return what to type instead of a run in `parent`, such that it compares several."""
    runs = find_runs(parent)
    if len(runs) < 2:
        return f"there is no other run in {parent} to compare it with"
    apart = ["task.mixed_data=true"] if held_out_differences(runs) else []
    return f"give the directory that holds it, {shlex.join([f'task.runs={parent}', *apart])}"


def differing_overrides(runs: Sequence[RunSummary]) -> list[str]:
    """Return the keys whose overrides differ between runs, or that some runs lack, in the order as typed.

    Leave out run.dir and the logger's: a run's name already tells where it lies, and its record in wandb is
    named after what differs.
    """
    keys = dict.fromkeys(key for run in runs for key in run.overrides)
    named = [key for key in keys if not key.startswith(("run.dir", "logger."))]
    return [key for key in named if len({run.overrides.get(key) for run in runs}) > 1]


def held_out_differences(runs: Sequence[RunSummary]) -> dict[str, dict[str, Any]]:
    """Return the keys on which the held-out data of evaluated runs differ, with their values by run."""
    evaluated = [run for run in _in_order(runs) if run.held_out is not None]
    return differing({run.name: run.held_out_data for run in evaluated})


def format_differences(found: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the differences in one line: `train.sequence_length is 32 in 0 2, 64 in 1; ...`."""
    told = []
    for key, values in found.items():
        names: dict[str, list[str]] = {}
        for name, value in values.items():
            names.setdefault(shown(value), []).append(name)
        parts = []
        for value, jobs in names.items():
            more = f" and {len(jobs) - _NAMED} more" if len(jobs) > _NAMED else ""
            parts.append(f"{value} in {' '.join(jobs[:_NAMED])}{more}")
        told.append(f"{key} is {', '.join(parts)}")
    return "; ".join(told)


def config_differences(runs: Sequence[RunSummary]) -> list[tuple[str, Kind, dict[str, Any]]]:
    """Return the keys on which the configs of runs differ, learnt ones first, with their kinds and values.

    The logger's keys are left out: they name a run after what differs, and change nothing.
    """
    known = [run for run in _in_order(runs) if run.config]
    kinds = {
        difference.key: difference.kind
        for run in known[1:]
        for difference in differences(known[0].config, run.config)
        if not difference.key.startswith("logger.")
    }
    leaves = {run.name: flatten(run.config) for run in known}
    ordered = sorted(kinds, key=lambda key: kinds[key] is not Kind.learnt)
    values = {key: {name: leaf.get(key, ABSENT) for name, leaf in leaves.items()} for key in ordered}
    return [(key, kinds[key], values[key]) for key in ordered]


def format_runs(
    runs: Sequence[RunSummary],
    keys: Sequence[str],
    farthest: Sequence[float | None] | None,
    mixed: Mapping[str, Mapping[str, Any]] | None = None,
) -> str:
    """Return the table of runs; `farthest` has the largest differences from a reference.

    `mixed` are the differences between their held-out data, for a column of it.
    """

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
    planned = [run.planned_tokens_per_second for run in runs]
    if any(value is not None for value in planned):
        titles.insert(-1, "planned")
        rows = [[*row[:-1], known(value, ",.0f"), row[-1]] for row, value in zip(rows, planned, strict=True)]
    if farthest is not None:
        titles.append("farthest")
        rows = [[*row, known(value, ".1e")] for row, value in zip(rows, farthest, strict=True)]
    if mixed:
        titles.append("held-out data")
        cells = [
            " ".join(f"{key}={shown(at[run.name])}" for key, at in mixed.items() if run.name in at)
            for run in runs
        ]
        rows = [[*row, cell or "-"] for row, cell in zip(rows, cells, strict=True)]
    if any(run.convergence for run in runs):
        titles.append("convergence")
        rows = [[*row, run.convergence or "-"] for row, run in zip(rows, runs, strict=True)]
    return format_table(
        rows, titles, left_aligned=("job", "overrides", "state", "held-out data", "convergence")
    )


def _is_run_dir(folder: Path) -> bool:
    # A run has both files; wandb's folders, for one, have a config.yaml of their own.
    complete = (folder / CONFIG_FILE).is_file() and (folder / OVERRIDES_FILE).is_file()
    return complete or (folder / FAILED_FILE).is_file()


def read_run(folder: Path, name: str) -> RunSummary:
    """Read a run's files; a file that is missing or damaged leaves its values unknown, and is told of."""
    failure, failed_overrides = read_failure(folder)
    damage: list[str] = []
    stored: Any = _read_yaml(folder / OVERRIDES_FILE, damage)
    typed = [str(override) for override in stored] if isinstance(stored, list) else failed_overrides
    overrides = dict(pair for pair in map(split_override, typed) if pair)
    config: Any = _read_yaml(folder / CONFIG_FILE, damage)
    config = upgrade_node(config) if isinstance(config, dict) else {}
    try:
        steps = int(config["train"]["steps"])
    except (KeyError, TypeError, ValueError, OverflowError):
        steps = None
    try:
        rows = jsonl.read_rows(folder / "metrics.jsonl")
    except (OSError, BadFile) as error:
        rows = []
        damage.append(str(error))
    return RunSummary(name, folder, overrides, steps, failure, rows, config, read_environment(folder), damage)


def _read_yaml(path: Path, damage: list[str]) -> object:
    """Return the content of a YAML file; None where it cannot be read, which `damage` then tells."""
    try:
        return read_yaml(path)
    except MissingFile:  # of a job that failed before it began
        return None
    except BadFile as error:
        damage.append(str(error))
        return None


def _in_order(runs: Sequence[RunSummary]) -> list[RunSummary]:
    """Return the runs by their names, where an order by loss would rank them."""
    return sorted(runs, key=lambda run: _natural_order(Path(run.name)))


def _natural_order(path: Path) -> list[tuple[int, str]]:
    """Return a sort key that puts job 10 after job 9."""
    return [(int(part), "") if part.isdecimal() else (0, part) for part in re.split(r"(\d+)", str(path))]
