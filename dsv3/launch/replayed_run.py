"""task=replay: find the way to a step of a run, the config that it was taken with, and what was recorded.

The run's files are read and never written: a run may go on while one of its steps is computed again, and no
lock is taken. What the checkpoints say of their time counts, for a resume may have changed the config since.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from dsv3.checkpoint.directory import (
    CONFIG_FILE,
    Progress,
    complete_steps,
    newest_checkpoint,
    step_number,
)
from dsv3.checkpoint.training_record import TrainingRecord, weights_identity
from dsv3.config.convergence import ABSENT, differences, flatten
from dsv3.config.data import ROW_ORDER
from dsv3.config.launch import LaunchConfig
from dsv3.config.overrides import override_key
from dsv3.config.registry import Stored
from dsv3.config.root import Config
from dsv3.config.strict import to_absolute_yaml
from dsv3.errors import UserError
from dsv3.launch.job import under_launcher
from dsv3.launch.resume import ResumedRun
from dsv3.launch.trained_on import run_data, run_record, training_record
from dsv3.launch.typed_keys import matches
from dsv3.metrics import accident_journal
from dsv3.metrics.row import MetricsRow
from dsv3.untrusted_files import MissingFile, open_file

METRICS_FILE = "metrics.jsonl"

_LAYOUT = ("parallel", "launch", "launch.nproc", "launch.nnodes", "launch.world_size")
"""Keys that choose another number of ranks, or may."""

_ROUNDING = (
    *("parallel", "precision", "recompute", "compile", "optimizer.fused", "model.attention.kernel"),
    *("train.microbatch_size", "train.deterministic"),
)
"""Keys by which the same step is computed with other sums or other roundings."""

_NO_ROUNDING = ("parallel.min_world_size",)
"""Keys below these by which it is not."""

_BY_DEGREE = tuple(f"parallel.{node}" for node in ("tensor", "expert", "context", "pipeline"))
"""Nodes that act where the degree of their axis is above 1, which parallel.degrees and the ranks tell."""


@dataclass(frozen=True)
class Timeline:
    """The history of a run that a replay repeats, as accidents.jsonl tells it."""

    skipped: dict[int, dict[str, Any]] = field(default_factory=dict)
    """The entries of the steps that were skipped, by step."""
    jumps: dict[int, tuple[int, int]] = field(default_factory=dict)
    """By the step that the run went back to: the sequence that had come next, and the one that then came."""

    @classmethod
    def of(cls, entries: Iterable[Mapping[str, Any]]) -> "Timeline":
        """Return the history that counts: steps that a rewind has undone are no part of it."""
        skipped: dict[int, dict[str, Any]] = {}
        jumps: dict[int, tuple[int, int]] = {}
        for entry in entries:
            step = entry["step"]
            if entry["kind"] == "rewind" and "samples" in entry:
                skipped = {number: each for number, each in skipped.items() if number <= step}
                jumps = {number: each for number, each in jumps.items() if number < step}
                jumps[step] = (entry["samples"][0], entry["samples"][1])
            elif entry.get("skipped") is True:
                skipped[step] = dict(entry)
        return cls(skipped, jumps)

    def first_sample(self, progress: Progress) -> int:
        """Return the sequence with which the step behind `progress` begins."""
        before, after = self.jumps.get(progress.step, (0, 0))
        return after if before <= progress.samples < after else progress.samples

    def between(self, first: int, last: int) -> "Timeline":
        """Return what concerns the steps `first` to `last`, which is little enough to send to every rank."""
        skipped = {step: entry for step, entry in self.skipped.items() if first <= step <= last}
        return Timeline(
            skipped, {step: jump for step, jump in self.jumps.items() if first - 1 <= step < last}
        )

    def holds(self, checkpoint: Path) -> bool:
        """Return whether a checkpoint is part of this history: not of steps that a rewind has undone.

        Its progress is read only where there was a rewind before its step: a run may keep thousands.
        """
        step = step_number(checkpoint)
        passed = [after for number, (_, after) in self.jumps.items() if number < step]
        return not passed or Progress.read(checkpoint).samples > max(passed)


@dataclass(frozen=True)
class ReplayedRun:
    """A run, and the way to one of its steps."""

    directory: Path
    step: int
    stored: ResumedRun
    """The run with the config of the time of the step."""
    checkpoint: Path | None
    """The nearest checkpoint before the step; None: the run's begin."""
    data_fingerprint: str | None
    """The data that the step was trained on."""
    world_size: int | None
    """Ranks of the run at this step; None where no file tells that of its time."""

    @property
    def first_step(self) -> int:
        """Return the first step that is computed again."""
        return 1 + (step_number(self.checkpoint) if self.checkpoint is not None else 0)

    @classmethod
    def read(cls, directory: Path, step: int) -> "ReplayedRun":
        """Read what the files of a run say of a step.

        Raises:
            UserError: it is no run, or nothing leads to this step any more.
        """
        where = f"task.run={directory}"
        if not (directory / CONFIG_FILE).is_file():
            what = "holds no run" if directory.is_dir() else "is no directory"
            raise UserError(f"{where} {what}: give the directory of a run, as outputs/TIME")
        try:
            stored = ResumedRun.read(directory)
        except UserError as error:
            raise UserError(str(error).replace(f"resume={directory}", where, 1)) from None
        timeline = read_timeline(directory)
        steps = complete_steps(directory)
        later = next((each for each in steps if step_number(each) >= step and timeline.holds(each)), None)
        before = (each for each in reversed(steps) if step_number(each) < step and timeline.holds(each))
        checkpoint = next(before, None)
        record = (training_record(later) if later is not None else None) or _newest_record(directory)
        world = stored.environment.get("world_size")
        same = all(stored.config.get(node) == record.config.get(node) for node in ("parallel", "launch"))
        found = cls(
            directory,
            step,
            replace(stored, config=record.config),
            checkpoint,
            _fingerprint_at(record, step),
            world if same and type(world) is int and world > 0 else None,
        )
        found.require_one_stretch(record)
        if checkpoint is None:
            found.require_begin(record)
        return found

    def require_taken(self, rows: Mapping[int, MetricsRow], span: tuple[int, int] | None) -> None:
        """Raise UserError where the run has recorded no such step; `span` are its first and last one."""
        if self.step in rows:
            return
        taken = f"has steps {span[0]:,} to {span[1]:,} in {METRICS_FILE}" if span else "has recorded no step"
        raise UserError(f"task.step={self.step}: {self.directory} {taken}{self._checkpoints()}")

    def defaults(self, typed: Sequence[str], allow: Sequence[str]) -> Stored:
        """Return the run's values as defaults of the command; groups that are `typed` bring their own.

        On the run's own layout its microbatches are kept too: their sums round alike. The processes are those
        of the run, started here, whoever had started them; `allow` are the modules of run.allow_targets.
        """
        try:
            stored = self.stored.defaults(typed, allow)
        except UserError as error:
            raise UserError(
                str(error).replace(f"resume={self.directory}", f"task.run={self.directory}", 1)
            ) from None
        values: dict[str, Any] = {name: dict(node) for name, node in stored.values.items()}
        nodes = dict(stored.defaults)
        keys = set(map(override_key, typed))
        own_layout = not any(key in _LAYOUT or key.startswith("parallel.") for key in keys)
        train = self.stored.config.get("train")
        if own_layout and isinstance(train, dict) and type(train.get("microbatch_size")) is int:
            values.setdefault("train", {})["microbatch_size"] = train["microbatch_size"]
        values.setdefault("checkpoint", {})["async_save"] = False  # nothing is saved: no room for copies
        values.get("train", {}).pop("callbacks", None)  # none is called
        moments = flatten(self.stored.config).get("precision.moments")
        if "precision" in keys and moments is not None:  # the optimizer's state is as the run has stored it
            values.setdefault("precision", {})["moments"] = moments
        if "launch" not in keys:
            world = self.world_size if own_layout and not under_launcher() else None
            launch = LaunchConfig(nproc=world)
            timeout = flatten(self.stored.config).get("launch.timeout")
            launch.timeout = timeout if type(timeout) is int else launch.timeout
            nodes["launch"] = OmegaConf.structured(launch)
        return replace(stored, defaults=nodes, values=values)

    @property
    def notes(self) -> list[str]:
        """Return lines on what the replay leaves out or takes long for."""
        train = self.stored.config.get("train")
        callbacks = train.get("callbacks") if isinstance(train, dict) else None
        notes = []
        if callbacks:
            names = ", ".join(f"train.callbacks.{name}" for name in callbacks)
            notes.append(f"a replay calls no callback: what {names} changed in the model is missing")
        if self.step > self.first_step:
            begin = "the run's begin" if self.checkpoint is None else self.checkpoint.name
            notes.append(f"steps {self.first_step:,} to {self.step:,} are computed, from {begin}")
        return notes

    def setup_differences(self, config: Config, here: Mapping[str, Any]) -> dict[str, list[Any]]:
        """Return what may let the same step round otherwise here: {what: [in the run, here]}.

        `config` is completed; `here` is what run_dir.environment_here says.
        """
        found: dict[str, list[Any]] = {}
        now = flatten(to_absolute_yaml(config))
        for each in differences(flatten(self.stored.config), now):
            if each.key in _NO_ROUNDING or not matches(each.key, _ROUNDING):
                continue
            pair = [None if value == ABSENT else value for value in (each.a, each.b)]
            node = ".".join(each.key.split(".")[:2])
            if None not in pair or node == each.key or not node.startswith("parallel."):
                found[each.key] = pair
            elif node not in _BY_DEGREE:  # it is there on one side alone
                found[node] = ["off" if value is None else "on" for value in pair]
        before = _flat_environment(self.stored.environment)
        for key, value in _flat_environment(here).items():
            if before.get(key) != value:
                found[key] = [before.get(key), value]
        return {key: pair for key, pair in found.items() if pair[0] != pair[1]}

    def removed_message(self, checkpoint: Path) -> str:
        """Return what to say of a checkpoint that was there when the command began."""
        return (
            f"task.run={self.directory}: {checkpoint.name} was removed while it was read, as a run does that "
            f"goes on (checkpoint.keep_last): give the command again{self._checkpoints()}"
        )

    def _checkpoints(self) -> str:
        """Return which checkpoints are there, behind another sentence."""
        names = [each.name for each in complete_steps(self.directory)]
        shown = ", ".join(names if len(names) <= 8 else [*names[:4], "...", *names[-3:]])
        return f"; checkpoints: {shown}" if names else "; no checkpoint"

    def require_one_stretch(self, record: TrainingRecord) -> None:
        """Raise UserError where the way to the step is not told by one config and one data."""
        changes = sorted(past["step"] for past in [*record.history, *record.data_changes])
        between = [step for step in changes if self.first_step <= step < self.step]
        after = [past["step"] for past in record.history if self.step <= past["step"] < record.step]
        told = f"task.step={self.step}: {self.directory} changed its config or its data after step"
        if between:
            raise UserError(
                f"{told} {between[-1]}, and no checkpoint from there to step {self.step - 1} is left"
                f"{self._checkpoints()}"
            )
        if after:
            raise UserError(
                f"{told} {after[0]}, and no checkpoint from step {self.step} to there is left to say how it "
                f"was before{self._checkpoints()}"
            )
        if record.row_order != ROW_ORDER:
            raise UserError(
                f"task.step={self.step}: older code trained {self.directory} on the rows in another order, "
                "which this version does not know"
            )

    def require_begin(self, record: TrainingRecord) -> None:
        """Raise UserError where the weights that the run began with are not there, or are others by now."""
        load = flatten(record.config).get("checkpoint.load")
        if load is None:
            return
        way = f"task.step={self.step}: no checkpoint comes before it, and the run began with {load}"
        try:
            now = weights_identity(load)
        except UserError:
            raise UserError(f"{way}, which is not there{self._checkpoints()}") from None
        before = self.stored.environment.get("weights") or record.weights
        if before is not None and before != now:
            raise UserError(f"{way}, which holds other weights now{self._checkpoints()}")


def find_step(config: Config) -> ReplayedRun:
    """Return the run and the step that a checked config of task=replay names.

    Raises:
        UserError: there is no such run or step, nothing leads to it, or the command does not read the run.
    """
    task: Any = config.task
    run = ReplayedRun.read(Path(task.run).absolute(), task.step)
    if not config.run.resume:
        raise UserError("task=replay takes its config from the run: type task.run=DIR task.step=N themselves")
    if config.launch.submits:
        raise UserError("task=replay tells its result here: start it with srun in an allocation instead")
    if not under_launcher():  # its ranks need not all read metrics.jsonl: rank 0 does, before the others work
        run.require_taken(*read_rows(run.directory, run.step, run.step))
    return run


def read_timeline(directory: Path) -> Timeline:
    """Return what a run has skipped and where it has gone back."""
    return Timeline.of(accident_journal.read(directory / accident_journal.ACCIDENTS_FILE))


def read_rows(directory: Path, first: int, last: int) -> tuple[dict[int, MetricsRow], tuple[int, int] | None]:
    """Return the rows of metrics.jsonl from step `first` to `last`, and the first and last step of the file.

    Of a step written twice the later line counts. Damaged lines, as a run may be writing now, are skipped.
    """
    rows: dict[int, MetricsRow] = {}
    span: tuple[int, int] | None = None
    try:
        with open_file(directory / METRICS_FILE) as file:
            for line in file:
                try:
                    row = MetricsRow.from_json(line.decode(errors="replace"))
                except (ValueError, RecursionError):
                    continue
                span = (min(span[0], row.step), max(span[1], row.step)) if span else (row.step, row.step)
                if first <= row.step <= last:
                    rows[row.step] = row
    except MissingFile:
        return {}, None
    return rows, span


def _newest_record(directory: Path) -> TrainingRecord:
    """Return the record of a run by its config.yaml, with the history that its newest checkpoint tells."""
    newest = newest_checkpoint(directory)
    record, before = run_record(directory), training_record(newest) if newest is not None else None
    order = run_data(directory).get("row_order", 1)
    history = before.history if before is not None else []
    return replace(record, history=history, row_order=before.row_order if before is not None else order)


def _fingerprint_at(record: TrainingRecord, step: int) -> str | None:
    """Return the fingerprint of the data that a step was trained on."""
    changes = sorted(record.data_changes, key=lambda change: change["step"])
    return next((change["from"] for change in changes if change["step"] >= step), record.data_fingerprint)


def _flat_environment(environment: Mapping[str, Any]) -> dict[str, Any]:
    """Return what of an environment.json decides how numbers are rounded."""
    hardware, packages = environment.get("hardware"), environment.get("packages")
    return {
        "torch": packages.get("torch") if isinstance(packages, Mapping) else None,
        "hardware": hardware.get("name") if isinstance(hardware, Mapping) else None,
        "processor": environment.get("processor"),
        "threads": environment.get("threads"),
        "ranks": environment.get("world_size"),
        "git_commit": environment.get("git_commit"),
    }
