"""task=replay: compute a step of a run again, from the nearest checkpoint before it: it repeats, or not.

A bad number that repeats comes from the data, the weights or the number format; one that does not comes from
the hardware. The run is read alone: it may go on meanwhile, lie on a read-only disk, and keeps every byte.
"""

from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

from dsv3.checkpoint.agreement import on_main
from dsv3.checkpoint.directory import Progress, find_checkpoint
from dsv3.checkpoint.manifest import verify_together
from dsv3.checkpoint.restore import restore_training
from dsv3.config.strict import to_yaml
from dsv3.data.batch import Batch
from dsv3.data.packing import PADDING
from dsv3.data.sources import PreparedData
from dsv3.distributed.heartbeat import FIRST_CALL, HEARTBEAT
from dsv3.distributed.process_group import RankContext, make_deterministic
from dsv3.errors import UserError
from dsv3.launch.job import Job
from dsv3.launch.replayed_run import ReplayedRun, Timeline, read_rows, read_timeline
from dsv3.launch.run_dir import data_recorded_at, environment_here
from dsv3.metrics.progress import phase
from dsv3.metrics.row import MetricsRow
from dsv3.tasks.assembly import Assembly, assemble, own_tokenizer
from dsv3.tasks.replay_report import Found, tell
from dsv3.tasks.replay_verdict import COMPARED, ComparedStep, Setup, matmul_precision
from dsv3.tasks.setup import join_ranks, prepare_data
from dsv3.tokens.tokenizer import Tokenizer
from dsv3.training.gradient_places import Place, ranked
from dsv3.training.step import StepMetrics
from dsv3.training.step_guard import GOOD, SPIKE
from dsv3.training.step_taker import StepTaker


class ReplayTask:
    """Prints a table to stderr and one JSON object as stdout's last line; its `verdict` is what was found."""

    def __init__(self, run: str, step: int, text: int) -> None:
        self.run_dir, self.step = Path(run).absolute(), step
        self.text = text

    def run(self, job: Job) -> None:
        """Replay the step of `job`; write nothing but the data cache."""
        make_deterministic(job.config.train.deterministic, job.config.train.seed)
        with join_ranks(job) as ranks:
            found: list[ReplayedRun] = []
            on_main(ranks, lambda: found.append(ReplayedRun.read(self.run_dir, self.step)))
            _replay(job, ranks.broadcast_object(found[0] if found else None), ranks, self.text)


def _replay(job: Job, run: ReplayedRun | None, world: RankContext, text: int) -> None:
    """Compute the steps from the checkpoint to the one asked for; rank 0 tells what was found."""
    assert run is not None
    tokenizer = own_tokenizer(job)
    data = prepare_data(job.config, world, tokenizer)
    recorded: list[tuple[dict[int, MetricsRow], Setup]] = []  # for rank 0, which compares

    def read() -> Timeline:
        rows, timeline, setup = _what_the_run_says(job, run, data, world.device.type)
        recorded.append((rows, setup))
        return timeline

    timeline = on_main(world, read)
    load = job.config.checkpoint.load if run.checkpoint is None else None
    start = on_main(world, lambda: find_checkpoint(load)) if load else None
    built = assemble(job, world, data, initial=run.checkpoint is None and start is None)
    progress = built.begin_with(start) if run.checkpoint is None else _restore(run, built)
    built.go_on(progress)
    rows = recorded[0][0] if recorded else {}
    steps = _take_steps(run, built, progress, timeline, rows)
    texts = _texts(steps, built.ranks, text, data.tokenizer or tokenizer)
    if recorded:
        entry = timeline.skipped.get(run.step)
        tell(Found(run, steps.compared, entry, recorded[0][1], steps.samples, steps.places), texts)


def _what_the_run_says(
    job: Job, run: ReplayedRun, data: PreparedData, device: str
) -> tuple[dict[int, MetricsRow], Timeline, Setup]:
    """Return the rows of the steps to come, what to skip of them, and how this command computes otherwise.

    UserError where the data is not that of the step, or the run has recorded no such step.
    """
    if run.data_fingerprint is not None and data.fingerprint != run.data_fingerprint:
        raise UserError(
            f"task.run={run.directory} was trained on other data in step {run.step} (fingerprint "
            f"{run.data_fingerprint}, now {data.fingerprint}): give the data as it was, data.path=PATH"
        )
    data.verify_newer(data_recorded_at(run.directory))
    rows, span = read_rows(run.directory, run.first_step, run.step)
    run.require_taken(rows, span)
    config = job.config
    setup = Setup(
        run.setup_differences(config, environment_here(job)),
        matmul_precision(run.stored.config),
        matmul_precision(to_yaml(config)),
        config.train.deterministic or device == "cpu",
    )
    return rows, read_timeline(run.directory).between(run.first_step, run.step), setup


def _restore(run: ReplayedRun, built: Assembly) -> Progress:
    """Fill model and optimizer from the checkpoint, and return its progress; it may go away meanwhile."""
    assert run.checkpoint is not None
    try:
        verify_together(run.checkpoint, built.ranks)
        parts = built.model.model_parts
        progress, notes = restore_training(run.checkpoint, parts, built.optimizer, built.ranks)
    except (UserError, OSError) as error:
        if not run.checkpoint.exists():
            raise UserError(run.removed_message(run.checkpoint)) from None
        if isinstance(error, OSError):
            raise UserError(f"{run.checkpoint} cannot be read: {error.strerror or error}") from None
        raise
    if notes:  # the run had this state when it took the step: nothing can be compared without it
        raise UserError(f"task.run={run.directory}: {notes[0]}")
    return progress


class _Steps:
    """The result of the steps: every step beside its record, and more of the last one."""

    def __init__(self) -> None:
        self.compared: list[ComparedStep] = []
        self.batches: list[Batch] = []
        """This rank's microbatches of the last step."""
        self.samples = (0, 0)
        """First sequence of the last step, and the one behind it."""
        self.places: list[Place] = []
        """Where the gradient of the last step is not finite, or the largest where it is a spike."""


def _take_steps(
    run: ReplayedRun,
    built: Assembly,
    progress: Progress,
    timeline: Timeline,
    rows: dict[int, MetricsRow],
) -> _Steps:
    """Take the steps behind `progress` up to the one asked for, those that the run skipped excepted.

    Spikes are looked for in the last one alone: the run has taken the steps before it.
    """
    rule, ranks, found = built.config.train.accidents, built.ranks, _Steps()
    steps = built.steps(progress.statistics, replace(rule, skip=True, spike_factor=float("inf")))
    compiles = built.config.compile.enabled or ranks.device.type == "cuda"
    total, first = run.step - progress.step, True
    span = f"step {run.step}" if total == 1 else f"steps {progress.step + 1} to {run.step}"
    with closing(steps.batches), phase(f"computing {span} again", total, "steps", together=True) as work:
        while progress.step < run.step:
            progress.samples = timeline.first_sample(progress)
            number, is_last = progress.step + 1, progress.step + 1 == run.step
            if number in timeline.skipped and not is_last:
                steps.pass_over(progress)
                found.compared.append(ComparedStep(number, rows.get(number), None))
            else:
                if is_last:
                    assert steps.step.guard is not None
                    steps.step.guard.config = replace(rule, skip=True)
                begin = progress.samples
                with HEARTBEAT.patient(FIRST_CALL if first and compiles else 0.0):
                    found.batches = steps.microbatches(progress)
                    metrics = steps.step(found.batches, steps.hyperparameters(number))
                    replayed = {name: float(value) for name, value in _compared(metrics).items()}
                steps.pass_over(progress)
                found.samples = begin, progress.samples
                found.compared.append(ComparedStep(number, rows.get(number), replayed))
                if first:
                    ranks.meet()
                    ranks.limit_collectives(first_calls=False)
                    first = False
                if is_last:
                    found.places = _places(steps, metrics, ranks)
            work.advance()
    return found


def _compared(metrics: StepMetrics) -> dict[str, Any]:
    """Return the metrics that a step is compared by; without a target it has no loss."""
    compared = {name: value for name, value in metrics.known().items() if name in COMPARED}
    if metrics.targets is not None and not metrics.targets.item():
        del compared["loss"]
        compared.pop("mtp_loss", None)
    return compared


def _places(steps: StepTaker, metrics: StepMetrics, ranks: RankContext) -> list[Place]:
    """Return where the gradient is not finite, or the largest of a spike, over all ranks."""
    kind = GOOD if metrics.accident is None else int(metrics.accident)
    if kind == GOOD or metrics.gradient_places is None:
        return []
    own, _ = steps.step.places.report(metrics.gradient_places.tolist(), kind == SPIKE)
    every = [place for places in ranks.all_gather_object(own) for place in places]
    return ranked(every, kind == SPIKE)


def _texts(steps: _Steps, ranks: RankContext, most: int, tokenizer: Tokenizer | None) -> list[str]:
    """Return a line for each sequence of the last step with at most so many characters; none for 0."""
    if not most:
        return []
    rows = [pair for batch in steps.batches for pair in zip(batch.tokens, batch.documents, strict=True)]
    first = steps.samples[0] + ranks.data_rank * len(rows)
    own = {}
    for number, (tokens, documents) in enumerate(rows, first):
        ids, of, shown = tokens.tolist(), documents.tolist(), []
        for document in dict.fromkeys(each for each in of if each != PADDING):
            part = [token for token, each in zip(ids, of, strict=True) if each == document]
            text = " ".join(map(str, part)) if tokenizer is None else tokenizer.decode(part, False)
            shown.append(ascii_line(text, most))
        line = " | ".join(shown)
        own[number] = line if len(line) <= most else f"{line[:most]}..."
    known = {number: line for lines in ranks.all_gather_object(own) for number, line in lines.items()}
    return [f"sequence {number}: {known[number]}" for number in sorted(known)]


def ascii_line(text: str, most: int) -> str:
    """Return a text in one line, its control characters escaped; a little more than `most` characters."""
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode() for char in text[: most + 1]
    )
