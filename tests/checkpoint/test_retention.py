import errno
from pathlib import Path

import pytest

from dsv3.checkpoint import directory
from dsv3.checkpoint.directory import Progress, complete_steps, find_checkpoint, step_directory
from dsv3.checkpoint.retention import best_step, doubt_notes, kept, last_good, prune, update_pointers
from dsv3.config.checkpoint import CheckpointConfig
from dsv3.errors import InvalidValue, UserError


def make(run_dir: Path, losses: dict[int, float | None]) -> list[Path]:
    """Make checkpoints of these steps, with the held-out loss of each."""
    for step, loss in losses.items():
        path = step_directory(run_dir, step)
        path.mkdir(parents=True)
        (path / ".metadata").touch()
        Progress(step, evaluation_loss=loss).write(path)
    return complete_steps(run_dir)


def numbers(run_dir: Path) -> list[int]:
    return [directory.step_number(path) for path in complete_steps(run_dir)]


LOSSES = {2: 3.0, 4: None, 6: 1.0, 8: None, 10: 2.0, 12: 1.0, 14: 4.0}


@pytest.mark.parametrize(
    ("config", "stay"),
    [
        (CheckpointConfig(keep_last=1), [14]),
        (CheckpointConfig(keep_last=3), [10, 12, 14]),
        (CheckpointConfig(keep_last=1, keep_every=4), [4, 8, 12, 14]),
        (CheckpointConfig(keep_last=1, keep_every=1), list(LOSSES)),
        (CheckpointConfig(keep_last=1, keep_best=True), [6, 14]),
        (CheckpointConfig(keep_last=9), list(LOSSES)),
    ],
    ids=str,
)
def test_what_stays(tmp_path: Path, config: CheckpointConfig, stay: list[int]) -> None:
    steps = make(tmp_path, LOSSES)
    assert kept(steps, config) == {step_directory(tmp_path, step) for step in stay}
    prune(tmp_path, config)
    assert numbers(tmp_path) == stay


@pytest.mark.parametrize("config", [CheckpointConfig(keep_last=0), CheckpointConfig(keep_every=0)], ids=str)
def test_a_number_that_keeps_nothing_is_refused(config: CheckpointConfig) -> None:
    with pytest.raises(InvalidValue, match=r"keep_(last|every)=0 is not possible"):
        config.validate()


def test_the_best_is_the_earlier_of_equals_and_none_without_a_loss(tmp_path: Path) -> None:
    steps = make(tmp_path, LOSSES)
    assert best_step(steps) == step_directory(tmp_path, 6)
    assert best_step(make(tmp_path / "other", {2: None, 4: None})) is None


def test_a_damaged_old_checkpoint_is_not_the_best_and_ends_nothing(tmp_path: Path) -> None:
    steps = make(tmp_path, LOSSES)
    (step_directory(tmp_path, 6) / "state.json").write_text("{")
    assert best_step(steps) == step_directory(tmp_path, 12)


def test_pointers_are_relative_and_lead_to_the_newest_and_the_best(tmp_path: Path) -> None:
    make(tmp_path / "run", LOSSES)
    prune(tmp_path / "run", CheckpointConfig(keep_best=True))
    moved = (tmp_path / "run").rename(tmp_path / "moved")
    assert str((moved / "checkpoints/latest").readlink()) == "step-14"
    assert str((moved / "checkpoints/best").readlink()) == "step-6"
    assert find_checkpoint(str(moved / "checkpoints/best")) == step_directory(moved, 6)
    assert find_checkpoint(f"{moved}/checkpoints/latest/") == step_directory(moved, 14)
    assert (moved / "checkpoints/best/.metadata").exists()


def test_a_pointer_leads_to_a_checkpoint_at_every_moment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(tmp_path, {2: 1.0, 4: 2.0})
    config = CheckpointConfig(keep_last=1, keep_best=True)
    prune(tmp_path, config)
    make(tmp_path, {6: 0.5})
    seen: list[tuple[str, str]] = []
    for name in ("symlink_to", "replace", "unlink", "rename"):
        call = getattr(Path, name)

        def watched(*arguments: object, _call: object = call, **keywords: object) -> object:
            result = _call(*arguments, **keywords)  # type: ignore[operator]
            found = [
                (tmp_path / "checkpoints" / pointer).resolve(strict=True) for pointer in ("latest", "best")
            ]
            seen.append((found[0].name, found[1].name))
            return result

        monkeypatch.setattr(Path, name, watched)
    prune(tmp_path, config)
    assert seen[-1] == ("step-6", "step-6")
    assert set(seen) <= {("step-4", "step-2"), ("step-6", "step-2"), ("step-6", "step-6")}
    assert numbers(tmp_path) == [6]


def test_a_pointer_that_is_right_is_left_alone(tmp_path: Path) -> None:
    make(tmp_path, LOSSES)
    update_pointers(tmp_path, CheckpointConfig())
    before = (tmp_path / "checkpoints/latest").lstat()
    update_pointers(tmp_path, CheckpointConfig())
    assert (tmp_path / "checkpoints/latest").lstat() == before


def test_without_keep_best_there_is_no_best(tmp_path: Path) -> None:
    make(tmp_path, LOSSES)
    prune(tmp_path, CheckpointConfig(keep_best=True))
    prune(tmp_path, CheckpointConfig())
    assert not (tmp_path / "checkpoints/best").is_symlink()
    assert numbers(tmp_path) == [12, 14]
    with pytest.raises(UserError, match="best does not exist"):
        find_checkpoint(str(tmp_path / "checkpoints/best"))


def test_where_there_are_no_links_a_run_means_its_newest_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(Path, "symlink_to", refuse)
    make(tmp_path, LOSSES)
    prune(tmp_path, CheckpointConfig(keep_best=True))
    assert numbers(tmp_path) == [6, 12, 14]
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == [
        "step-12",
        "step-14",
        "step-6",
    ]
    assert find_checkpoint(str(tmp_path)) == step_directory(tmp_path, 14)
    assert find_checkpoint(str(step_directory(tmp_path, 6))) == step_directory(tmp_path, 6)
    with pytest.raises(UserError, match="latest does not exist"):
        find_checkpoint(str(tmp_path / "checkpoints/latest"))


def test_a_disk_that_fails_is_not_one_without_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "symlink_to", fail)
    make(tmp_path, LOSSES)
    with pytest.raises(OSError, match="No space left"):
        prune(tmp_path, CheckpointConfig())


def test_a_pointer_cannot_lead_out_of_the_run(tmp_path: Path) -> None:
    make(tmp_path / "run", LOSSES)
    (tmp_path / "elsewhere/step-3").mkdir(parents=True)
    for target in ("../../elsewhere/step-3", "../../elsewhere"):
        pointer = tmp_path / "run/checkpoints/latest"
        pointer.unlink(missing_ok=True)
        pointer.symlink_to(target)
        with pytest.raises(UserError, match="neither a run nor a checkpoint"):
            find_checkpoint(str(pointer))


@pytest.mark.parametrize("there", [True, False])
def test_a_copy_that_followed_a_link_becomes_its_step(tmp_path: Path, there: bool) -> None:
    """`scp -r` and the like make a directory of the link."""
    make(tmp_path, {2: 1.0, 4: 2.0})
    step_directory(tmp_path, 4).rename(tmp_path / "checkpoints/latest")
    if there:
        make(tmp_path, {4: 2.0})
    update_pointers(tmp_path, CheckpointConfig())
    assert numbers(tmp_path) == [2, 4]
    assert str((tmp_path / "checkpoints/latest").readlink()) == "step-4"


def mark(steps: list[Path], *doubtful: int) -> None:
    """Mark steps as saved while the loss was above its past."""
    for step in steps:
        progress = Progress.read(step)
        progress.statistics.alarm = progress.step in doubtful
        progress.write(step)


def test_the_last_good_one_stays_and_one_saved_under_an_alarm_is_not_the_best(tmp_path: Path) -> None:
    steps = make(tmp_path, {1: 3.0, 2: 2.0, 3: 2.5, 4: 1.0, 5: 9.0, 6: 9.0})
    mark(steps, 4, 5, 6)
    assert last_good(steps) == steps[2]
    assert last_good(steps, before=3) == steps[1]
    assert best_step(steps) == steps[1]
    prune(tmp_path, CheckpointConfig(keep_last=2, keep_best=True))
    assert numbers(tmp_path) == [2, 3, 5, 6]
    told = f"{steps[5]} was saved while its loss was above its past (docs/reliability.md, bad numbers); "
    assert doubt_notes(steps[5]) == [f"{told}{steps[2]} is the last good one"]
    assert doubt_notes(steps[2]) == doubt_notes(tmp_path) == []
    mark(complete_steps(tmp_path), 2, 3, 5, 6)
    assert last_good(complete_steps(tmp_path)) is None
