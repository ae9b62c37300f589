import json
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from dsv3.checkpoint.directory import complete_steps
from dsv3.checkpoint.manifest import check_newest, shares, verify_together, with_way_out
from dsv3.errors import RunFailed, UserError
from dsv3.tokens.file_digests import FileEntry
from tests.checkpoint import hostile
from tests.harness.checkpoints import seal, unseal
from tests.harness.commands import TrainCommand
from tests.harness.outcome import Outcome
from tests.harness.runs import rows
from tests.harness.trained import ALONE, Trained

pytestmark = pytest.mark.slow


def _entries(*sizes: int) -> dict[str, FileEntry]:
    return {f"file{number}": FileEntry(size, "") for number, size in enumerate(sizes)}


def test_the_ranks_share_the_bytes_and_leave_no_file_out() -> None:
    entries = _entries(7, 1, 5, 3, 3, 2, 0, 9)
    for world in (1, 3, 20):
        parts = shares(entries, world)
        assert sorted(name for part in parts for name in part) == sorted(entries)
        assert len(parts) == world
    loads = [sum(entries[name].size for name in part) for part in shares(entries, 3)]
    assert max(loads) - min(loads) <= 1


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 16
    path.write_bytes(content)


def _halve(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


FILES = (".metadata", "__0_0.distcp", "model.yaml", "state.json", "tokenizer/tokenizer.json", "manifest.json")


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", [_flip, _halve, Path.unlink], ids=["flipped", "truncated", "missing"])
def test_damage_to_any_file_is_named(step: Path, name: str, damage: Callable[[Path], None]) -> None:
    damage(step / name)
    with pytest.raises(UserError) as caught:
        verify_together(step, ALONE)
    assert str(caught.value).startswith(f"{step / name} ")
    assert len(str(caught.value).splitlines()) == 1


def test_every_rank_reads_its_share_alone(step: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _flip(step / "__0_0.distcp")
    monkeypatch.setattr(
        "dsv3.distributed.process_group.RankContext.all_gather_object", lambda self, value: [value]
    )
    found = []
    for rank in range(3):
        try:
            verify_together(step, replace(ALONE, rank=rank, world=3))
        except UserError:
            found.append(rank)
    assert found == [0]  # the largest goes to the first


def test_what_one_rank_cannot_read_is_every_ranks_error(step: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever it raises: a rank that raised alone would leave the others waiting for it."""

    def fail(*_: object) -> None:
        raise MemoryError("no room for a buffer")

    monkeypatch.setattr("dsv3.checkpoint.manifest.check_digests", fail)
    told: list[object] = []

    def exchanged(ranks: object, value: object) -> list[object]:
        told.append(value)
        return [([None], None), value]

    monkeypatch.setattr("dsv3.distributed.process_group.RankContext.all_gather_object", exchanged)
    with pytest.raises(RunFailed, match=r"^rank 1 failed: MemoryError: no room for a buffer$"):
        verify_together(step, replace(ALONE, rank=1, world=2))
    assert len(told) == 1


def test_a_flipped_bit_of_a_tensor_stops_restoring_with_a_way_out(run_dir: Path, trained: Trained) -> None:
    older = trained.save(run_dir)
    trained.step()
    newest = trained.save(run_dir)
    _flip(newest / "__0_0.distcp")
    check_newest(newest)  # sizes and texts are sound
    other = Trained(seed=1)
    before = other.state()
    with pytest.raises(UserError, match=r"__0_0\.distcp is altered") as caught:
        other.restore(run_dir)
    assert other.state() == before
    lines = str(caught.value).splitlines()
    assert len(lines) == 2
    assert lines[1].startswith(
        f"to go on from {older.name} instead: mkdir -p {run_dir}/damaged && mv {newest} "
    )


def test_the_way_out_passes_over_what_is_damaged_too(run_dir: Path, trained: Trained) -> None:
    steps = []
    for _ in range(3):
        steps.append(trained.save(run_dir, keep_last=3))
        trained.step()
    _halve(steps[1] / "__0_0.distcp")
    told = str(with_way_out(UserError("damaged"), steps[2]))
    assert f"from step-1 instead: mkdir -p {run_dir}/damaged && mv {steps[2]} {steps[1]} " in told
    _halve(steps[0] / "__0_0.distcp")
    assert "from step 0, as no older checkpoint is whole, instead" in str(
        with_way_out(UserError("damaged"), steps[2])
    )


def test_a_planted_pickle_is_not_executed_whatever_the_manifest_says(step: Path, tmp_path: Path) -> None:
    marker = tmp_path / "executed"
    for name, (pickled, _) in hostile.attacks(f"touch {marker}").items():
        (step / ".metadata").write_bytes(pickled)
        with pytest.raises(UserError, match=r"\.metadata is "):
            Trained(seed=1).restore(step.parent.parent)
        seal(step)
        with pytest.raises(UserError, match=r"\.metadata is refused"):
            Trained(seed=1).restore(step.parent.parent)
        assert not marker.exists(), name


@pytest.fixture(scope="module")
def _finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("finished") / "run"


@pytest.fixture
def run(commands: TrainCommand, _finished: Path, tmp_path: Path) -> Path:
    """Train a run of four steps with checkpoints of the last two, which a test may damage."""
    if not _finished.exists():
        every = ["train.checkpoint_every=1", "train.evaluate_every=2", "checkpoint.keep_best=true"]
        commands.train(_finished, "train.steps=4", *every)
    subprocess.run(["cp", "-a", _finished, tmp_path / "run"], check=True)
    return tmp_path / "run"


def _refused(outcome: Outcome, path: Path, lines: int) -> None:
    assert outcome.code == 2
    assert str(path) in outcome.err
    assert len(outcome.err.strip().splitlines()) == lines
    assert outcome.out == ""


@pytest.mark.parametrize("name", ["__0_0.distcp", "model.yaml", "state.json"])
def test_a_resume_stops_at_a_damaged_checkpoint_and_its_command_goes_on_before_it(
    commands: TrainCommand, run: Path, name: str
) -> None:
    _flip(run / "checkpoints/step-4" / name)
    expected = rows(run)
    outcome = commands.run(f"resume={run}")
    _refused(outcome, run / "checkpoints/step-4" / name, 2)
    assert rows(run) == expected
    move, _, resume = outcome.err.strip().splitlines()[1].partition("instead: ")[2].rpartition(" && ")
    subprocess.run(move, shell=True, check=True)
    assert resume == f"python train.py resume={run}"
    commands.must(f"resume={run}")
    assert rows(run) == expected
    assert complete_steps(run)[-1].name == "step-4"


@pytest.mark.parametrize("command", ["evaluate", "generate", "train"])
def test_a_flipped_bit_is_noticed_by_every_command_that_loads(
    commands: TrainCommand, run: Path, command: str
) -> None:
    data = ["data=text", f"data.path={commands.text}", "train.sequence_length=32"]
    load = f"checkpoint.load={run}/checkpoints/latest"
    arguments = {
        "evaluate": ["task=evaluate", load, *data],
        "generate": ["task=generate", load, "task.prompt=w1", "task.max_tokens=1"],
        "train": [load, f"run.dir={run.parent / 'next'}", "logger=none", "train.steps=1", *data],
    }[command]
    commands.must(*arguments)
    _flip(run / "checkpoints/step-4/__0_0.distcp")
    arguments = [argument.replace("/next", "/other") for argument in arguments]
    _refused(commands.run(*arguments), run / "checkpoints/step-4/__0_0.distcp", 1)


def test_the_best_checkpoint_is_kept_and_can_be_named(commands: TrainCommand, run: Path) -> None:
    losses = {row["step"]: row["evaluation_loss"] for row in rows(run) if row["evaluation_loss"] is not None}
    best = min(losses, key=lambda step: losses[step])
    assert (run / "checkpoints/best").resolve().name == f"step-{best}"
    assert {path.name for path in complete_steps(run)} == {f"step-{best}", "step-3", "step-4"}
    data = ["data=text", f"data.path={commands.text}", "data.held_out=0.1", "train.sequence_length=32"]
    outcome = commands.must("task=evaluate", f"checkpoint.load={run}/checkpoints/best", *data)
    assert json.loads(outcome.out)["loss"] == pytest.approx(losses[best], abs=1e-6)


def test_a_run_of_the_time_before_manifests_goes_on(commands: TrainCommand, run: Path) -> None:
    for step in complete_steps(run):
        unseal(step)
    commands.must(f"resume={run}", "train.steps=5")
    assert rows(run)[-1]["step"] == 5


def test_what_loading_does_not_need_is_verified_too(step: Path) -> None:
    (step / "tokenizer/tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"tokenizer\.json is missing"):
        Trained(seed=1).restore(step.parent.parent)
