"""The loop: when it stops and what is done by then; how steps are timed."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch

from dsv3.checkpoint.directory import Progress
from dsv3.config.training import BalanceConfig, TrainConfig
from dsv3.data.batch import Batch
from dsv3.data.loader import DataLoader
from dsv3.data.packing import PackedRow
from dsv3.data.prefetch import Prefetcher
from dsv3.distributed.heartbeat import FIRST_CALL, HEARTBEAT
from dsv3.distributed.signals import StopRequest, StopSignal
from dsv3.metrics.progress import phase
from dsv3.metrics.recorder import Recorder
from dsv3.metrics.row import MetricsRow
from dsv3.planning.batch_schedule import BatchSchedule
from dsv3.training.callbacks import Callback, TrainingRun
from dsv3.training.loop import Loop
from dsv3.training.schedule import WarmupCosine
from dsv3.training.step_taker import StepTaker
from dsv3.training.throughput import Throughput
from tests.harness.trained import ALONE

STEPS, LENGTH = 5, 3
BATCH = BatchSchedule(2)


class NumberedRows:
    """Rows whose tokens are their number."""

    sequence_length = LENGTH

    def __len__(self) -> int:
        return 100

    def row(self, index: int) -> PackedRow:
        """Return the number once for each token."""
        return PackedRow(np.full(LENGTH + 1, index), np.zeros(LENGTH + 1, np.int32))


Act = Callable[[str, int], None]


class Work(Callback):
    """Evaluates in three batches after every step, so to speak, and saves at the end."""

    def __init__(self, act: Act) -> None:
        self.act = act

    def on_step_end(self, run: TrainingRun) -> None:
        """Evaluate."""
        with phase("evaluating", 3, "batches", together=True) as work:
            for _ in range(3):
                self.act("batch", run.step)
                work.advance()
        self.act("evaluated", run.step)

    def on_save_request(self, run: TrainingRun) -> None:
        """Save and go on."""
        self.act("save asked for", run.step)

    def on_train_end(self, run: TrainingRun, finished: bool) -> None:
        """Save."""
        self.act("finished" if finished else "saved", run.step)


class Record(Callback):
    """Comes behind another callback, as the one does that records the row; may want to stop."""

    def __init__(self, act: Act) -> None:
        self.act = act
        self.wanted = False

    def on_step_end(self, run: TrainingRun) -> None:
        """Record."""
        self.act("recorded", run.step)

    @property
    def wants_stop(self) -> bool:
        """Return True where a save in the background has failed, so to speak."""
        return self.wanted


class Run:
    """A run of five steps over nothing; `act` is told of all that it does, and may ask it to stop."""

    def __init__(
        self,
        act: Callable[["Run", str, int], None] = lambda run, what, step: None,
        batch: BatchSchedule = BATCH,
        progress: Progress | None = None,
        **train: Any,
    ) -> None:
        self.events: list[tuple[str, int]] = []
        self.seen: list[int] = []
        self.told: list[str] = []
        self.request = StopRequest(leaves=True)

        def note(what: str, step: int) -> None:
            self.events.append((what, step))
            act(self, what, step)

        self.record = Record(note)
        config: Any = SimpleNamespace(
            train=TrainConfig(
                steps=STEPS, balance=BalanceConfig(bias_speed=0.0), sequence_length=LENGTH, **train
            ),
            optimizer=SimpleNamespace(lr=1.0),
            compile=SimpleNamespace(enabled=True),
        )
        shown: Any = SimpleNamespace(has_shown_steps=True, message=self.told.append)
        nothing: Any = None
        self.run = TrainingRun(config, Path(), ALONE, nothing, nothing, progress or Progress(), shown)

        def take(batches: list[Batch], now: object) -> None:
            self.seen += [int(row[0]) for batch in batches for row in batch.tokens]
            note("step", self.run.step + 1)

        batches = Prefetcher(DataLoader(NumberedRows(), batch, 1), 2, ALONE.device)
        self.loop = Loop(
            self.run,
            StepTaker(cast(Any, take), batches, WarmupCosine(1, STEPS, 0.1), config),
            Throughput(1.0, None, torch.device("cpu")),
            [Work(note), self.record],
            StopSignal(self.request),
        )


@pytest.mark.parametrize("stopped_after", range(1, STEPS))
def test_across_a_ramp_and_a_resume_at_any_step_each_row_is_taken_once(stopped_after: int) -> None:
    ramp = BatchSchedule(5, 1, 2, 4 * LENGTH, LENGTH)  # steps of 1, 1, 3, 5, 5 rows
    first = Run(batch=ramp, stop_after=stopped_after)
    assert first.loop.train()
    progress = first.run.progress
    assert progress.samples == ramp.samples_after(0, stopped_after) == len(first.seen)
    resumed = Run(batch=ramp, progress=replace(progress))
    assert resumed.loop.train()
    assert first.seen + resumed.seen == list(range(15))
    assert (resumed.run.progress.samples, resumed.run.progress.tokens) == (15, 15 * LENGTH)
    told = [f"from step {step} on the batch has {size} sequences" for step, size in ((3, 3), (4, 5))]
    assert first.told + resumed.told == told


def test_a_row_has_the_seconds_that_its_step_waited_for_data_and_the_tokens_of_its_own_batch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = iter([0.0, 1.5, 2.0, 2.25])
    monkeypatch.setattr("dsv3.training.step_taker.time", SimpleNamespace(perf_counter=lambda: next(clock)))
    rows: list[MetricsRow] = []

    def act(run: Run, what: str, step: int) -> None:
        if what == "recorded":
            rows.append(run.run.row)

    run = Run(act, batch=BatchSchedule(3, 1, 2, LENGTH, LENGTH), stop_after=2)
    assert run.loop.train()
    assert [(row.data_wait, row.tokens) for row in rows] == [(1.5, LENGTH), (0.25, 4 * LENGTH)]


def whole_step(step: int) -> list[tuple[str, int]]:
    """What happens in a step that nothing interrupts."""
    return [("step", step), *[("batch", step)] * 3, ("evaluated", step), ("recorded", step)]


def test_a_run_that_nothing_stops_takes_all_its_steps() -> None:
    run = Run()
    assert run.loop.train()
    assert run.events == [event for step in range(1, 6) for event in whole_step(step)] + [("finished", 5)]


@pytest.mark.parametrize("asked_in", ["step", "batch"])
def test_a_stop_ends_what_callbacks_do_then_the_row_is_recorded_and_the_run_saved(asked_in: str) -> None:
    def act(run: Run, what: str, step: int) -> None:
        run.request.requested |= (what, step) == (asked_in, 3)

    run = Run(act)
    assert not run.loop.train()
    # The batch in which it comes is the last one: there is no other rank to agree with.
    expected = [*whole_step(1), *whole_step(2), ("step", 3), ("batch", 3), ("recorded", 3), ("saved", 3)]
    assert run.events == expected


def test_after_the_last_step_a_stop_cuts_nothing_off_because_a_resume_would_not_make_up_for_it() -> None:
    def act(run: Run, what: str, step: int) -> None:
        run.request.requested |= (what, step) == ("batch", STEPS)

    run = Run(act)
    assert not run.loop.train()
    assert run.events[-6:] == [*whole_step(STEPS)[1:], ("saved", STEPS)]


@pytest.mark.parametrize("asked_in", ["step", "batch", "recorded"])
def test_a_request_to_save_is_met_behind_the_step_and_the_run_goes_on(asked_in: str) -> None:
    def act(run: Run, what: str, step: int) -> None:
        run.request.save_requested |= (what, step) == (asked_in, 2)

    run = Run(act)
    assert run.loop.train()
    expected = [event for step in range(1, 6) for event in whole_step(step)] + [("finished", 5)]
    expected.insert(2 * len(whole_step(1)), ("save asked for", 2))
    assert run.events == expected


@pytest.mark.parametrize("stops", [True, False])
def test_a_request_to_save_at_the_end_asks_for_no_second_save(stops: bool) -> None:
    def act(run: Run, what: str, step: int) -> None:
        if (what, step) == ("step", STEPS - stops):
            run.request.save_requested, run.request.requested = True, stops

    run = Run(act)
    assert run.loop.train() is not stops
    assert "save asked for" not in dict(run.events)


def test_a_callback_may_want_the_run_to_stop() -> None:
    def act(run: Run, what: str, step: int) -> None:
        run.record.wanted |= (what, step) == ("recorded", 2)

    run = Run(act)
    assert not run.loop.train()
    assert run.events == [*whole_step(1), *whole_step(2), ("saved", 2)]


def test_a_signal_ends_the_process_until_the_first_step_is_taken_which_may_compile_for_long() -> None:
    found: list[tuple[str, bool, float]] = []

    def act(run: Run, what: str, step: int) -> None:
        if what in ("step", "recorded"):
            found.append((what, run.request.leaves, HEARTBEAT.patience))

    Run(act).loop.train()
    assert found[:4] == [
        ("step", True, FIRST_CALL),
        ("recorded", False, 0.0),
        ("step", False, 0.0),
        ("recorded", False, 0.0),
    ]


class Event:
    """An event of a GPU's stream; it is reached only when the host waits for it."""

    waits = 0
    clock = 0.0

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        """Take the device's time: a step lasts 0.5 s there, and the host is far ahead."""
        Event.clock += 0.25
        self.at = Event.clock

    def synchronize(self) -> None:
        """Let the host wait."""
        Event.waits += 1

    def elapsed_time(self, end: "Event") -> float:
        """Return milliseconds."""
        return 1000 * (end.at - self.at)


def test_on_a_gpu_the_host_waits_for_no_step_before_its_row_is_read_and_the_time_is_the_devices(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "Event", Event)
    recorder = Recorder(tmp_path / "metrics.jsonl", ALONE, 3, None, None)
    recorder.every = 3  # as on a GPU
    throughput = Throughput(2.0, 1000.0, torch.device("cuda"))
    rows = [MetricsRow(step=step, tokens=8 * step) for step in (1, 2, 3)]
    for row in rows:
        assert Event.waits == 0
        throughput.start()
        recorder.add(row, {}, throughput.stop(row, 8))
    assert Event.waits == 3
    assert [(row.tokens_per_second, row.mfu) for row in rows] == [(8 / 0.25, 8 / 0.25 * 2 / 1000)] * 3
    recorder.close()


def test_on_cpu_the_row_has_its_throughput_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = iter([10.0, 12.0])
    monkeypatch.setattr("dsv3.training.throughput.time.perf_counter", lambda: next(seconds))
    row, throughput = MetricsRow(step=1, tokens=8), Throughput(2.0, None, torch.device("cpu"))
    throughput.start()
    throughput.stop(row, 8)
    assert (row.tokens_per_second, row.mfu) == (4.0, None)
