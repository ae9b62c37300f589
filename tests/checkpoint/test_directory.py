import os
import shlex
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from dsv3.checkpoint.directory import (
    Progress,
    commit,
    complete_steps,
    find_checkpoint,
    prepare_partial,
    remove,
    step_directory,
    stray_notes,
    stray_steps,
    sweep_leftovers,
    write_text,
)
from dsv3.checkpoint.manifest import check_newest
from dsv3.errors import UserError


def _make(run_dir: Path, *steps: int) -> list[Path]:
    made = [step_directory(run_dir, step) for step in steps]
    for directory in made:
        directory.mkdir(parents=True)
        (directory / ".metadata").touch()
    return made


def test_steps_are_ordered_by_number_and_others_are_left_out(tmp_path: Path) -> None:
    nine, ten, hundred = _make(tmp_path, 9, 10, 100)
    for name in (".partial-step-200", ".removed-step-300", "step-", "step-4x", "notes"):
        (tmp_path / "checkpoints" / name).mkdir()
    assert complete_steps(tmp_path) == [nine, ten, hundred]
    assert complete_steps(tmp_path / "nothing") == []


STRAYS: dict[str, Callable[[Path], object]] = {
    "pipe": lambda path: os.mkfifo(path),
    "file": Path.touch,
    "empty": Path.mkdir,
    "link": lambda path: path.symlink_to("nowhere"),
}


@pytest.mark.parametrize("kind", STRAYS)
def test_what_has_a_steps_name_and_never_was_one_is_passed_over(tmp_path: Path, kind: str) -> None:
    (nine,) = _make(tmp_path, 9)
    stray = step_directory(tmp_path, 99)
    STRAYS[kind](stray)
    assert (complete_steps(tmp_path), stray_steps(tmp_path)) == ([nine], [stray])
    (note,) = stray_notes(tmp_path)
    told, _, typed = note.partition("; to remove: ")
    assert told == f"passed over in {tmp_path}/checkpoints, as no checkpoint is in it: step-99"
    subprocess.run(shlex.split(typed), check=True)
    assert not os.path.lexists(stray)
    assert stray_notes(tmp_path) == []
    # A save that comes to this step takes the place.
    STRAYS[kind](stray)
    partial = prepare_partial(stray)
    (partial / ".metadata").touch()
    commit(partial, stray)
    assert complete_steps(tmp_path) == [nine, stray]
    assert {path.name for path in stray.parent.iterdir()} == {"step-9", "step-99"}


def test_many_strays_are_one_line(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    for number in range(2000):
        (folder / f"step-{number}").touch()
    (note,) = stray_notes(tmp_path)
    assert "step-0, step-1, step-2 and 1997 more; to remove: " in note
    assert len(note) < 500 + 4 * len(str(tmp_path))


def test_a_step_that_lost_files_is_damaged_and_not_passed_over(tmp_path: Path) -> None:
    nine, ten = _make(tmp_path, 9, 10)
    (ten / ".metadata").rename(ten / "__0_0.distcp")
    assert complete_steps(tmp_path) == [nine, ten]
    with pytest.raises(UserError, match=rf"{ten} has lost its \.metadata, .*\nto go on from step-9") as error:
        check_newest(ten)
    move, _, resume = str(error.value).partition("instead: ")[2].rpartition(" && ")
    assert resume == f"python train.py resume={tmp_path}"
    subprocess.run(move, shell=True, check=True)
    assert complete_steps(tmp_path) == [nine]
    check_newest(nine)


def test_a_text_that_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "text").mkdir()
    with pytest.raises(OSError, match="directory"):
        write_text(tmp_path / "text", "x")
    assert [path.name for path in tmp_path.iterdir()] == ["text"]


def test_a_run_means_its_newest_checkpoint(tmp_path: Path) -> None:
    *_, newest = _make(tmp_path, 9, 10)
    assert find_checkpoint(str(tmp_path)) == newest


def test_a_step_of_a_run_means_itself(tmp_path: Path) -> None:
    older, _ = _make(tmp_path, 9, 10)
    assert find_checkpoint(str(older)) == older


def test_a_converted_checkpoint_means_itself(tmp_path: Path) -> None:
    (tmp_path / ".metadata").touch()
    assert find_checkpoint(str(tmp_path)) == tmp_path


def test_a_path_that_does_not_exist_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"checkpoint.load=.*/nowhere does not exist"):
        find_checkpoint(str(tmp_path / "nowhere"))


def test_a_run_without_a_checkpoint_is_told_from_nonsense(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"{tmp_path} holds neither a run nor a checkpoint"):
        find_checkpoint(str(tmp_path))
    (tmp_path / "config.yaml").touch()
    with pytest.raises(UserError, match=f"{tmp_path} holds no checkpoint yet"):
        find_checkpoint(str(tmp_path))


def test_a_file_is_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="neither a run nor a checkpoint"):
        find_checkpoint(str(tmp_path / "file"))


def test_progress_comes_back_as_it_was_written(tmp_path: Path) -> None:
    for progress in (Progress(3, 24, 768), Progress(3, 24, 768, evaluation_loss=1.5)):
        progress.write(tmp_path)
        assert Progress.read(tmp_path) == progress


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(b"", id="empty"),
        pytest.param(b'{"step": 3, "sam', id="torn"),
        pytest.param(b"[3]", id="a list"),
        pytest.param(b'{"step": "3"}', id="text for a count"),
        pytest.param(b'{"step": -3}', id="negative"),
        pytest.param(b'{"step": 3.5}', id="a fraction"),
        pytest.param(b'{"steps": 3}', id="unknown key"),
        pytest.param(b'{"step": 3, "evaluation_loss": NaN}', id="a loss that is none"),
        pytest.param(b'{"step": 3, "evaluation_loss": "1"}', id="text for a loss"),
        pytest.param(b"\xff\xfe", id="no text"),
        pytest.param(b"[" * 100_000, id="endless nesting"),
    ],
)
def test_damaged_progress_is_told_with_its_path(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "state.json").write_bytes(content)
    with pytest.raises(UserError, match=f"{tmp_path}/state.json cannot be read"):
        Progress.read(tmp_path)


def test_missing_progress_is_told_with_its_path(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"{tmp_path}/state.json cannot be read"):
        Progress.read(tmp_path)


def test_a_commit_replaces_what_had_the_name(tmp_path: Path) -> None:
    (old,) = _make(tmp_path, 3)
    (old / "old").touch()
    partial = prepare_partial(old)
    (partial / "new").touch()
    commit(partial, old)
    assert [path.name for path in old.iterdir()] == ["new"]
    assert [path.name for path in old.parent.iterdir()] == ["step-3"]


def test_every_file_and_folder_is_on_the_disk_before_the_name_is_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = step_directory(tmp_path, 3)
    partial = prepare_partial(directory)
    (partial / "tokenizer").mkdir()
    (partial / "tokenizer" / "tokenizer.json").touch()
    synced: list[tuple[Path, bool]] = []
    monkeypatch.setattr(
        "dsv3.checkpoint.directory.sync", lambda path: synced.append((path, directory.exists()))
    )
    commit(partial, directory)
    before = {path for path, named in synced if not named}
    assert before == {partial, partial / "tokenizer", partial / "tokenizer" / "tokenizer.json"}
    assert (directory.parent, True) in synced


def test_a_partial_directory_starts_empty(tmp_path: Path) -> None:
    directory = step_directory(tmp_path, 3)
    (prepare_partial(directory) / "old").touch()
    partial = prepare_partial(directory)
    assert partial.parent == directory.parent
    assert list(partial.iterdir()) == []


def test_removing_takes_the_name_away_before_anything_is_deleted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (directory,) = _make(tmp_path, 3)
    seen: list[bool] = []
    monkeypatch.setattr(
        "dsv3.checkpoint.directory.shutil.rmtree", lambda *_, **__: seen.append(directory.exists())
    )
    remove(directory)
    assert seen[-1] is False
    assert complete_steps(tmp_path) == []


def test_removing_a_linked_checkpoint_takes_the_link_and_leaves_the_rest(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "kept").touch()
    (tmp_path / "checkpoints").mkdir()
    step_directory(tmp_path, 3).symlink_to(elsewhere)
    remove(step_directory(tmp_path, 3))
    assert complete_steps(tmp_path) == []
    assert (elsewhere / "kept").exists()


def test_leftovers_are_swept_and_checkpoints_stay(tmp_path: Path) -> None:
    (kept,) = _make(tmp_path, 3)
    for name in (".partial-step-6", ".removed-step-1"):
        (tmp_path / "checkpoints" / name / "deep").mkdir(parents=True)
    (tmp_path / "checkpoints/.partial-latest").symlink_to(kept.name)
    sweep_leftovers(tmp_path)
    assert list((tmp_path / "checkpoints").iterdir()) == [kept]


def test_a_text_file_is_replaced_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    write_text(path, "old")

    def killed(descriptor: int) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", killed)
        with pytest.raises(KeyboardInterrupt):
            write_text(path, "new")
    assert path.read_text() == "old"
    write_text(path, "new")
    assert path.read_text() == "new"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("name", ["config.json", "model-00001-of-00002.safetensors"])
def test_a_huggingface_checkpoint_is_called_one(tmp_path: Path, name: str) -> None:
    (tmp_path / name).touch()
    with pytest.raises(UserError, match=f"is a HuggingFace checkpoint: checkpoint.load=hf:{tmp_path} reads"):
        find_checkpoint(str(tmp_path))
    if name == "config.json":
        assert find_checkpoint(f"hf:{tmp_path}") == tmp_path
    else:
        with pytest.raises(UserError, match=r"is no HuggingFace checkpoint: it has no config\.json"):
            find_checkpoint(f"hf:{tmp_path}")


def test_hf_before_a_checkpoint_of_ours_or_the_home_is_understood(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "released").mkdir()
    (tmp_path / "released" / "config.json").touch()
    assert find_checkpoint("hf:~/released") == tmp_path / "released"
    _make(tmp_path / "run", 1)
    with pytest.raises(
        UserError, match=f"is no HuggingFace checkpoint: checkpoint.load={tmp_path}/run reads"
    ):
        find_checkpoint(f"hf:{tmp_path}/run")
    for path in ("hf:owner/name", "owner/name"):
        with pytest.raises(UserError, match=f"load={path} does not exist; .* repo=owner/name assets=all"):
            find_checkpoint(path)
