import resource
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from dsv3.checkpoint import save
from dsv3.checkpoint.directory import complete_steps
from dsv3.checkpoint.manager import CheckpointManager
from dsv3.checkpoint.manifest import read_manifest, verify
from dsv3.config.checkpoint import CheckpointConfig
from dsv3.errors import RunFailed
from dsv3.training.step import TrainStep
from tests.harness.checkpoints import tensors
from tests.harness.commands import TrainCommand
from tests.harness.runs import rows
from tests.harness.trained import ALONE, Trained

pytestmark = pytest.mark.slow

PATIENCE = 60.0


class Gate:
    """Holds back every write of tensors until it is opened."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.open = threading.Event()
        self.reached = threading.Event()
        write = save.save_tensors

        def held(*arguments: Any) -> None:
            self.reached.set()
            assert self.open.wait(PATIENCE)
            write(*arguments)

        patch.setattr(save, "save_tensors", held)


def manager(run_dir: Path, **config: Any) -> CheckpointManager:
    return CheckpointManager(run_dir, CheckpointConfig(**config), ALONE)


def begin(saving: CheckpointManager, trained: Trained) -> Path:
    return saving.save([trained.model], trained.optimizer, trained.progress)


def test_what_is_saved_is_the_state_at_the_call_however_it_changes_meanwhile(
    tmp_path: Path, trained: Trained, monkeypatch: pytest.MonkeyPatch
) -> None:
    at_once = trained.save(tmp_path / "sync", async_save=False)
    before = trained.state()
    gate = Gate(monkeypatch)
    saving = manager(tmp_path / "async")
    later = begin(saving, trained)
    assert gate.reached.wait(PATIENCE)
    trained.step()  # while nothing is written yet
    assert trained.state() != before
    assert not complete_steps(tmp_path / "async")
    gate.open.set()
    saving.wait()
    assert complete_steps(tmp_path / "async") == [later]
    assert tensors(later) == tensors(at_once)
    files, expected = read_manifest(later), read_manifest(at_once)
    assert files is not None
    assert expected is not None
    assert files.keys() == expected.keys()
    # .metadata holds an id of the save.
    assert {name for name in files if files[name] != expected[name]} <= {".metadata"}
    assert (later / "state.json").read_bytes() == (at_once / "state.json").read_bytes()


def test_one_save_at_a_time_and_each_in_the_same_memory(
    run_dir: Path, trained: Trained, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(monkeypatch)
    saving = manager(run_dir)
    first = begin(saving, trained)
    memory = {name: copy.data_ptr() for name, copy in saving.staging.host_copies.items()}
    threading.Timer(0.2, gate.open.set).start()
    trained.step()
    second = begin(saving, trained)
    assert complete_steps(run_dir)[0] == first  # the second waited for it
    saving.wait()
    assert complete_steps(run_dir) == [first, second]
    assert {name: copy.data_ptr() for name, copy in saving.staging.host_copies.items()} == memory
    assert tensors(first) != tensors(second)


def test_a_save_that_is_waited_for_takes_no_memory(run_dir: Path, trained: Trained) -> None:
    saving = manager(run_dir)
    saving.save([trained.model], trained.optimizer, trained.progress, wait=True)
    assert complete_steps(run_dir)
    assert not saving.staging.host_copies


def test_the_manifest_lists_every_file_and_is_true(run_dir: Path, trained: Trained) -> None:
    step = trained.save(run_dir)
    files = {str(path.relative_to(step)) for path in step.rglob("*") if path.is_file()}
    assert read_manifest(step) is not None
    assert set(read_manifest(step) or {}) == files - {"manifest.json"}
    assert verify(step)


@contextmanager
def full_disk() -> Iterator[None]:
    """No file may grow beyond 10 kB: the writes fail in the system itself, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("async_save", [True, False])
def test_a_full_disk_is_told_alike_and_leaves_no_rest(
    run_dir: Path, trained: Trained, async_save: bool
) -> None:
    saving = manager(run_dir, async_save=async_save)
    first = begin(saving, trained)
    saving.wait()
    trained.step()

    def save() -> None:
        begin(saving, trained)
        saving.wait()

    with full_disk(), pytest.raises(RunFailed) as caught:
        save()
    partial = run_dir / "checkpoints/.partial-step-2"
    assert str(caught.value) == (
        f"the checkpoint of step 2 cannot be saved: File too large ({partial}). "
        f"Mend that and go on from the last complete one: resume={run_dir}"
    )
    assert complete_steps(run_dir) == [first]
    assert not partial.exists()


def test_an_error_in_the_background_is_raised_by_the_next_save(
    run_dir: Path, trained: Trained, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied", "somewhere")

    monkeypatch.setattr(save, "commit", fail)
    saving = manager(run_dir)
    begin(saving, trained)
    deadline = time.monotonic() + PATIENCE
    while not saving.failed and time.monotonic() < deadline:
        time.sleep(0.01)
    assert saving.failed
    trained.step()
    with pytest.raises(RunFailed, match=r"step 1 cannot be saved: Permission denied \(somewhere\)"):
        begin(saving, trained)


EVERY_THREE = ("train.checkpoint_every=3", "train.evaluate_every=0")


def _failing(write: Callable[..., None]) -> Callable[..., None]:
    def fail(partial: Path, *arguments: Any) -> None:
        if partial.name == ".partial-step-3":
            raise OSError(28, "No space left on device", str(partial / "__0_0.distcp"))
        write(partial, *arguments)

    return fail


def test_a_run_ends_with_the_same_message_whether_it_saves_aside_or_not(
    commands: TrainCommand, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(save, "save_tensors", _failing(save.save_tensors))
    told, last = [], []
    for async_save in ("false", "true"):
        run = tmp_path / "run"
        with pytest.raises(AssertionError) as caught:
            commands.train(run, *EVERY_THREE, f"checkpoint.async_save={async_save}")
        told.append(str(caught.value).splitlines()[0])
        last.append(rows(run)[-1]["step"])
        run.rename(tmp_path / async_save)
    assert told[0] == told[1]
    assert "the checkpoint of step 3 cannot be saved: No space left on device" in told[0]
    # The step in hand is finished, perhaps one or two more, and no checkpoint is tried in between.
    assert last[0] == 3
    assert 3 <= last[1] <= 6
    assert not complete_steps(tmp_path / "true")


def test_steps_go_on_while_a_checkpoint_is_written_and_the_run_waits_for_it(
    commands: TrainCommand, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    straight, run = tmp_path / "straight", tmp_path / "run"
    settings = [*EVERY_THREE, "train.steps=5", "checkpoint.keep_last=3"]
    commands.train(straight, *settings, "checkpoint.async_save=false")
    step, taken, gate = TrainStep.__call__, [], Gate(monkeypatch)

    def counted(*arguments: Any) -> Any:
        taken.append(1)
        if len(taken) == 5:  # two steps after the save began
            assert gate.reached.is_set()
            gate.open.set()
        return step(*arguments)

    monkeypatch.setattr(TrainStep, "__call__", counted)
    commands.train(run, *settings)
    for name in ("step-3", "step-5"):
        assert tensors(run / "checkpoints" / name) == tensors(straight / "checkpoints" / name)
    assert rows(run) == rows(straight)


def test_a_run_that_breaks_finishes_the_save_in_flight(
    commands: TrainCommand, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step, taken, gate = TrainStep.__call__, [], Gate(monkeypatch)

    def breaking(*arguments: Any) -> Any:
        taken.append(1)
        if len(taken) == 4:
            threading.Timer(0.2, gate.open.set).start()
            raise RuntimeError("broken")
        return step(*arguments)

    monkeypatch.setattr(TrainStep, "__call__", breaking)
    with pytest.raises(AssertionError, match="broken"):
        commands.train(tmp_path / "run", *EVERY_THREE)
    assert [path.name for path in complete_steps(tmp_path / "run")] == ["step-3"]
