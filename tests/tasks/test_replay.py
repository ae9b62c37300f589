"""task=replay: a step is computed again from a run that stays as it is, and told to repeat or not."""

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from dsv3.checkpoint import manifest
from dsv3.distributed.directory_lock import DirectoryLock
from dsv3.metrics import accident_journal
from dsv3.training.step import LocalForwardBackward
from tests.harness.accidents import injected, spoil
from tests.harness.commands import PlannedCommand, TrainCommand
from tests.harness.outcome import refused
from tests.harness.pool import Pool
from tests.harness.tiny import MODEL, TRAINING
from tests.tasks.worker_replay import run_task

pytestmark = pytest.mark.slow

STEPS = ["train.steps=7", "train.checkpoint_every=3", "train.evaluate_every=0", "checkpoint.keep_last=9"]
"""Checkpoints after steps 3, 6 and 7."""

BAD = 5
"""The step that is made bad."""


def snapshot(directory: Path) -> dict[str, tuple[bytes, int]]:
    """Return content and time of change of every file and folder of a run."""
    return {
        str(path.relative_to(directory)): (
            path.read_bytes() if path.is_file() else b"",
            path.lstat().st_mtime_ns,
        )
        for path in [directory, *sorted(directory.rglob("*"))]
    }


def replayed(commands: TrainCommand, run: Path, step: int, *arguments: str) -> dict[str, Any]:
    """Replay a step of a run, which must keep every byte; return what the last line of stdout says."""
    before = snapshot(run)
    outcome = commands.must("task=replay", f"task.run={run}", f"task.step={step}", *arguments)
    assert snapshot(run) == before
    told: dict[str, Any] = json.loads(outcome.out.splitlines()[-1])
    return told | {"err": outcome.err}


@contextmanager
def bad_batch(kind: dict[str, Any], step: int) -> Iterator[Callable[[], None]]:
    """Make one batch bad, by its tokens: in a replay too. The value forgets it, as a fault of hardware."""
    inner, calls, bad = LocalForwardBackward.train, [], []

    def train(self: Any, microbatches: Any, *arguments: Any) -> Any:
        sums = inner(self, microbatches, *arguments)
        calls.append(microbatches[0].tokens)
        if len(calls) == step:
            bad.append(calls[-1])
        return spoil(self.model_parts, sums, kind) if any(calls[-1].equal(each) for each in bad) else sums

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LocalForwardBackward, "train", train)
        yield bad.clear


@pytest.fixture(scope="module")
def _runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture
def run(commands: TrainCommand, _runs: Path) -> Path:
    """A run in which nothing went wrong."""
    if not (_runs / "good").exists():
        commands.train(_runs / "good", *STEPS)
    return _runs / "good"


@pytest.mark.parametrize(("step", "begin"), [(1, None), (5, "step-3"), (7, "step-6")])
def test_a_good_step_repeats_bit_for_bit_from_the_nearest_checkpoint_before_it(
    commands: TrainCommand, run: Path, step: int, begin: str | None
) -> None:
    told = replayed(commands, run, step)
    assert (told["verdict"], told["repeats_exactly"], told["differs"]) == ("repeats", True, {})
    assert told["loss"]["difference"] == told["grad_norm"]["difference"] == 0.0
    assert (told["loss"]["here"], told["first_difference"], told["accident"]) == (
        told["loss"]["run"],
        None,
        None,
    )
    assert told["checkpoint"] == (None if begin is None else str(run / "checkpoints" / begin))
    assert told["samples"] == [4 * step - 4, 4 * step]
    assert [each["step"] for each in told["steps"]] == list(range(int((begin or "-0")[-1]) + 1, step + 1))
    assert "bit for bit" in told["err"]


def test_a_row_that_the_same_computation_does_not_give_is_the_hardware(
    commands: TrainCommand, run: Path, tmp_path: Path
) -> None:
    other = Path(shutil.copytree(run, tmp_path / "other", symlinks=True))
    lines = [json.loads(line) for line in (other / "metrics.jsonl").read_text().splitlines()]
    lines[4]["loss"] *= 1 + 1e-6  # less than another rounding gives: but here nothing rounds otherwise
    (other / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    told = replayed(commands, other, 5)
    assert (told["verdict"], told["first_difference"]) == ("differs", 5)
    assert told["cause"].startswith("hardware: the same step gives other numbers here")
    assert told["loss"]["difference"] == pytest.approx(told["loss"]["run"] * 1e-6, rel=0.01)
    later = replayed(commands, other, 6)
    assert (later["verdict"], later["first_difference"]) == ("differs", 5)
    assert "from step 5 on: task.step=5" in later["cause"]


def test_in_another_precision_or_layout_it_differs_by_rounding_and_how_much_is_told(
    commands: TrainCommand, tmp_path: Path
) -> None:
    run = tmp_path / "bf16"
    commands.train(run, *STEPS, "precision=bf16")
    assert replayed(commands, run, 5)["verdict"] == "repeats"
    told = replayed(commands, run, 5, "precision=fp32")
    assert (told["verdict"], told["repeats_exactly"]) == ("rounding", False)
    assert 0 < told["loss"]["relative"] < 5e-3
    assert told["precision"] == {"run": "bf16", "here": "fp32"}
    assert told["differs"]["precision.compute"] == ["bf16", "fp32"]
    split = replayed(commands, run, 5, "train.microbatch_size=2")
    assert split["verdict"] == "rounding"
    assert split["differs"] == {"train.microbatch_size": [4, 2]}


def test_a_bad_batch_repeats_and_its_layer_and_expert_are_named(
    commands: TrainCommand, tmp_path: Path
) -> None:
    name = "layers.1.ffn.experts.down_proj"
    kind = {"kind": "nan", "parameter": name, "expert": 3}
    with bad_batch(kind, BAD) as forget:
        commands.train(tmp_path / "run", *STEPS)
        told = replayed(commands, tmp_path / "run", BAD)
        assert (told["verdict"], told["accident"]["kind"]) == ("repeats", "nonfinite")
        assert told["cause"].startswith("data")
        assert (told["layer"], told["expert"], told["parameter"]) == ("layers.1", 3, f"{name}[3]")
        assert told["accident"]["expert"] == 3
        assert f"task.step={BAD} task.text=400" in told["err"]
        # The steps behind it were taken without it: so are they now.
        after = replayed(commands, tmp_path / "run", BAD + 1)
        assert (after["verdict"], after["loss"]["difference"]) == ("repeats", 0.0)
        assert [each["skipped"] for each in after["steps"]] == [False, True, False]
        forget()
        told = replayed(commands, tmp_path / "run", BAD)
    assert (told["verdict"], told["accident"]["kind"]) == ("differs", "nonfinite")
    assert told["cause"].startswith("hardware")
    assert told["layer"] is None


def test_a_spike_repeats_and_the_largest_gradients_are_named(commands: TrainCommand, tmp_path: Path) -> None:
    name = "layers.0.ffn.down_proj.weight"
    with bad_batch({"kind": "spike", "parameter": name, "factor": 1e5}, BAD):
        commands.train(tmp_path / "run", *STEPS, "train.accidents.spike_window=2")
        told = replayed(commands, tmp_path / "run", BAD)
    assert (told["verdict"], told["accident"]["kind"], told["parameter"]) == ("repeats", "spike", name)
    assert told["grad_norm"]["difference"] == 0.0
    again = replayed(commands, tmp_path / "run", BAD)
    assert (again["verdict"], again["accident"]["kind"], again["layer"]) == ("differs", "spike", None)


def test_steps_behind_a_rewind_are_taken_from_the_data_that_the_run_went_on_with(
    commands: TrainCommand, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    alarm = ["train.accidents.alarm_window=2", "train.accidents.alarm_steps=3"]
    rewinds = ["train.accidents.on_alarm=rewind", "train.steps=14", "train.checkpoint_every=3"]
    kick = injected({24: {"kind": "weights", "factor": 30.0}})
    commands.train(run, *alarm, *rewinds, "checkpoint.keep_last=9", *kick)
    rewind = next(each for each in accident_journal.read(run / "accidents.jsonl") if each["kind"] == "rewind")
    assert (rewind["step"], rewind["samples"][0]) == (6, 24)
    told = replayed(commands, run, 8)
    assert (told["verdict"], told["loss"]["difference"]) == ("repeats", 0.0)
    assert told["samples"] == [rewind["samples"][1] + 4, rewind["samples"][1] + 8]
    assert "train.callbacks.inject" in told["err"]


def test_a_bad_step_that_ended_its_run_is_computed_again_as_well(
    commands: TrainCommand, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    settings = [*MODEL, *TRAINING, *STEPS, "data=text", f"data.path={commands.text}"]
    with bad_batch({"kind": "loss"}, BAD):
        ended = commands.run(*settings, "train.accidents.skip=false", f"run.dir={run}")
        assert ended.code == 1
        told = replayed(commands, run, BAD)
    assert (told["verdict"], told["accident"]["kind"]) == ("repeats", "nonfinite")
    assert told["loss"] == {"run": None, "here": "nan", "difference": 0.0, "relative": 0.0}


def test_a_run_that_is_owned_or_lies_in_a_read_only_place_is_read(
    commands: TrainCommand, run: Path, tmp_path: Path
) -> None:
    closed = Path(shutil.copytree(run, tmp_path / "closed", symlinks=True))
    paths = [closed, *closed.rglob("*")]
    for path in paths:
        if not path.is_symlink():
            path.chmod(path.stat().st_mode & 0o555)
    try:
        with DirectoryLock(run, f"run.dir={run}"):  # as it does while it trains
            assert replayed(commands, run, 4)["verdict"] == "repeats"
        assert replayed(commands, closed, 4)["verdict"] == "repeats"
    finally:
        for path in paths:
            if not path.is_symlink():
                path.chmod(0o755)


def test_the_text_of_the_batch_is_shown_as_far_as_asked_for(commands: TrainCommand, run: Path) -> None:
    err = replayed(commands, run, 5, "task.text=80")["err"]
    lines = [line for line in err.splitlines() if line.startswith("sequence ")]
    assert [line.split(":")[0] for line in lines] == [f"sequence {number}" for number in range(16, 20)]
    assert all(len(line.split(": ", 1)[1]) <= 83 for line in lines)
    assert all("w" in line for line in lines)


def test_a_checkpoint_that_the_run_removes_meanwhile_is_told(
    commands: TrainCommand, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = Path(shutil.copytree(run, tmp_path / "other", symlinks=True))
    verify = manifest.verify_together

    def verify_late(directory: Path, ranks: Any) -> None:
        shutil.rmtree(directory)
        verify(directory, ranks)

    monkeypatch.setattr("dsv3.tasks.replay.verify_together", verify_late)
    outcome = commands.run("task=replay", f"task.run={other}", "task.step=5")
    refused(outcome, f"task.run={other}: step-3 was removed while it was read")
    assert "checkpoints: step-6, step-7" in outcome.err


MISTAKES = {
    "no run": (["task.step=1"], "task.run=null is not possible: give the directory of a run"),
    "no step": (["task.run={run}"], "task.step=null is not possible: give the step"),
    "a huge step": (["task.run={run}", f"task.step={'9' * 30}"], "task.step=999"),
    "a step to come": (
        ["task.run={run}", "task.step=8"],
        "task.step=8: {run} has steps 1 to 7 in metrics.jsonl; checkpoints: step-3, step-6, step-7",
    ),
    "nothing there": (["task.run=nowhere", "task.step=1"], "is no directory: give the directory of a run"),
    "no run in it": (["task.run={run}/checkpoints", "task.step=1"], "holds no run: give the directory"),
    "another model": (
        ["task.run={run}", "task.step=5", "model=16b"],
        "model=16b does nothing with task=replay",
    ),
    "other weights": (
        ["task.run={run}", "task.step=5", "checkpoint.load={run}"],
        "does nothing with task=replay",
    ),
    "a directory": (["task.run={run}", "task.step=5", "run.dir=x"], "writes no run directory"),
    "a sweep": (["-m", "task.run={run}", "task.step=5,6"], "computes one step: give it without -m"),
    "beside resume": (
        ["resume={run}"],
        "resume= continues training; to compute a step again: task=replay task.run={run} task.step=N",
    ),
    "too little memory": (
        ["task.run={run}", "task.step=5", "hardware.memory_bytes=1000"],
        "replay it where it was trained",
    ),
    "slurm": (["task.run={run}", "task.step=5", "launch=slurm"], "start it with srun in an allocation"),
    "other data": (
        ["task.run={run}", "task.step=5", "data.path={other}"],
        "was trained on other data in step 5 (fingerprint",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_what_cannot_be_replayed_is_refused_with_what_can(
    commands: TrainCommand, run: Path, tmp_path: Path, name: str
) -> None:
    (tmp_path / "text.txt").write_text("w1 w2 w3 w4 w5 w6 w7 w8\n" * 200)
    arguments, message = MISTAKES[name]
    places = {"run": str(run), "other": str(tmp_path / "text.txt")}
    before = snapshot(run)
    outcome = commands.run("task=replay", *(each.format(**places) for each in arguments))
    refused(outcome, message.format(**places))
    assert snapshot(run) == before
    assert not list(commands_dir().iterdir())


def commands_dir() -> Path:
    """Return the directory in which commands are given, where nothing may appear."""
    return Path.cwd()


def test_ranks_of_a_run_compute_its_step_again_bit_for_bit_and_one_alone_up_to_rounding(
    pool: Pool, planned: PlannedCommand, commands: TrainCommand, tmp_path: Path, text: Path, cache: Path
) -> None:
    run = tmp_path / "run"
    layout = ["parallel=fsdp", "launch.nproc=8", "hardware=cpu", "train.global_batch_size=8"]
    layout += ["train.steps=3", "train.checkpoint_every=1", "train.generate_every=0"]
    settings = {each.partition("=")[0]: each for each in [*MODEL, *TRAINING, *STEPS, *layout]}
    data = ["data=text", f"data.path={text}", f"data.cache_dir={cache}", f"run.dir={run}"]
    pool.run(run_task, planned.run(*settings.values(), *data).job)
    job = planned.run("task=replay", f"task.run={run}", "task.step=3", "hardware=cpu").job
    assert job.plan.world_size == 8
    before = snapshot(run)
    told = json.loads(pool.run(run_task, job)[0].splitlines()[-1])
    assert snapshot(run) == before
    assert (told["verdict"], told["differs"]) == ("repeats", {})
    assert told["checkpoint"].endswith("step-2")
    alone = replayed(commands, run, 3, "parallel=none", "hardware=cpu")
    assert alone["verdict"] == "rounding"
    assert alone["differs"]["ranks"] == [8, 1]
    assert 0 <= alone["loss"]["relative"] < 1e-4
