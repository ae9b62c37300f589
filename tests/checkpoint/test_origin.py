"""The settings that a run takes from a checkpoint or its own past, and those that it refuses to change."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml

from dsv3.checkpoint.directory import complete_steps
from tests.harness.accidents import injected
from tests.harness.checkpoints import last_tensors
from tests.harness.commands import TrainCommand
from tests.harness.outcome import refused
from tests.harness.runs import rows

pytestmark = pytest.mark.slow

TOKENIZER = "tokenizer/tokenizer.json"


@pytest.fixture(scope="module")
def _finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("finished") / "run"


@pytest.fixture
def first(commands: TrainCommand, _finished: Path) -> Path:
    """Train a run of two steps, which tests must not change."""
    if not _finished.exists():
        commands.train(_finished, "train.steps=2")
    return _finished


@pytest.fixture
def other_text(tmp_path: Path) -> Path:
    """Write text of other words, which would give another tokenizer."""
    folder = tmp_path / "other"
    folder.mkdir()
    for number in range(30):
        (folder / f"{number}.txt").write_text(f"quick brown foxes jump over {number} lazy dogs " * 12)
    return folder


def begin(commands: TrainCommand, first: Path, run: Path, *arguments: str) -> None:
    """Train a run from the weights of `first`, without naming the model again."""
    settings = ["data.held_out=0.1", "train.sequence_length=32", "train.steps=4", "logger=none"]
    settings += ["data=text", f"data.path={commands.text}", "train.global_batch_size=4"]
    commands.must(*settings, f"checkpoint.load={first}", *arguments, f"run.dir={run}")


def test_a_run_from_a_checkpoint_reads_other_text_with_its_tokenizer(
    commands: TrainCommand, first: Path, tmp_path: Path, other_text: Path
) -> None:
    begin(commands, first, tmp_path / "next", f"data.path={other_text}")
    assert (tmp_path / "next" / TOKENIZER).read_bytes() == (first / TOKENIZER).read_bytes()


def test_a_run_from_a_checkpoint_goes_on_as_if_it_had_not_stopped(
    commands: TrainCommand, first: Path, tmp_path: Path
) -> None:
    straight, stopped, origin = tmp_path / "straight", tmp_path / "stopped", tmp_path / "origin"
    shutil.copytree(first, origin)
    begin(commands, origin, straight)
    begin(commands, origin, stopped, "train.stop_after=2")
    shutil.rmtree(origin)
    commands.must(f"resume={stopped}")
    assert rows(stopped) == rows(straight)
    assert last_tensors(stopped) == last_tensors(straight)


def test_a_run_from_a_checkpoint_that_saved_nothing_begins_with_the_same_weights(
    commands: TrainCommand, first: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    begin(commands, first, straight)
    monkeypatch.chdir(first.parent)
    begin(commands, Path("run"), killed)
    shutil.rmtree(killed / "checkpoints")
    monkeypatch.chdir(tmp_path)
    commands.must(f"resume={killed}")
    assert rows(killed) == rows(straight)


def test_a_run_goes_on_with_other_data_only_knowingly(
    commands: TrainCommand, first: Path, tmp_path: Path
) -> None:
    run, text = tmp_path / "runs" / "run", tmp_path / "text"
    shutil.copytree(first, run)
    shutil.copytree(commands.text, text)
    for file in text.iterdir():
        file.touch()
    commands.must(f"resume={run}", f"data.path={text}")  # moved and touched, but the same
    before = (run / "environment.json").read_bytes()
    assert json.loads(before)["data"]["changes"] == []
    changed = sorted(text.iterdir())[3]
    changed.write_text(changed.read_text() + "and some more words\n")
    (text / "new.txt").write_text("one more document\n" * 20)
    command = [f"resume={run}", f"data.path={text}", "train.steps=12"]
    outcome = commands.run(*command)
    assert outcome.code == 2
    told = f"1 file changed ({changed.name}), 1 file added (new.txt); from step 3 on rows come from another"
    assert "was trained on other data up to step 2 (fingerprint" in outcome.err
    assert told in outcome.err
    assert "data.allow_change=true" in outcome.err.splitlines()[-1]
    assert len(outcome.err.splitlines()) == 2
    assert (run / "environment.json").read_bytes() == before
    note = "its data changed after step 2 (fingerprint "
    outcome = commands.must(*command, "data.allow_change=true", "train.stop_after=4")
    assert note in outcome.out
    assert told in outcome.out
    for file in (run / "environment.json", run / "checkpoints" / "step-4" / "training.yaml"):
        stored = yaml.safe_load(file.read_text())
        (change,) = stored["data"]["changes"] if "data" in stored else stored["data_changes"]
        assert (change["step"], change["from"]) == (2, json.loads(before)["data"]["fingerprint"])
        assert f"{change['what']}; {change['effect']}".startswith(told)
    # It counts for the command that types it; what it did stays on record.
    assert note in commands.must(f"resume={run}", "train.stop_after=5").out
    changed.write_text("other words again\n")
    outcome = commands.run(f"resume={run}")
    assert outcome.code == 2
    assert "up to step 5" in outcome.err
    assert f"run: {note}" in commands.must("task=compare", f"task.runs={run.parent}").out


def test_equal_lengths_keep_the_rows_of_a_run(commands: TrainCommand, tmp_path: Path) -> None:
    run, text = tmp_path / "run", tmp_path / "text"
    shutil.copytree(commands.text, text)
    commands.train(run, f"data.path={text}", "train.steps=2")
    for file in sorted(text.iterdir()):  # the first one that stays on its side of the split
        words = file.read_text().split(" ")
        place = next(n for n in range(2, len(words)) if words[n] != words[1])
        words[1], words[place] = words[place], words[1]
        before = file.read_text()
        file.write_text(" ".join(words))
        outcome = commands.run(f"resume={run}", "train.steps=3")
        file.write_text(before)
        assert outcome.code == 2
        assert f"1 file changed ({file.name})" in outcome.err
        if "from step 3 on only the rows that hold these documents differ" in outcome.err:
            return
    raise AssertionError("no change of a text has left the lengths as they were")


def test_a_byte_of_shards_that_changed_since_is_told(commands: TrainCommand, tmp_path: Path) -> None:
    run, shards = tmp_path / "run", tmp_path / "shards"
    commands.must(
        *("task=prepare", f"task.input={commands.text}", f"task.output={shards}", "tokenizer.vocab_size=300")
    )
    commands.train(run, "data=shards", f"data.path={shards}", "train.steps=2", "train.stop_after=1")
    file = next(shards.glob("train-*.tokens.npy"))
    content = bytearray(file.read_bytes())
    content[-2] ^= 1
    file.write_bytes(content)
    outcome = commands.run(f"resume={run}")
    assert outcome.code == 2
    assert f"{file} has the digest" in outcome.err


def test_the_data_of_a_run_is_recorded_for_its_resume(
    commands: TrainCommand, first: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(first, run)
    (run / "environment.json").write_text("{}")
    shutil.rmtree(run / "checkpoints")  # each of which says it too
    outcome = commands.run(f"resume={run}")
    assert outcome.code == 2
    assert "environment.json" in outcome.err


def test_the_width_of_given_ids_is_the_length_everywhere(commands: TrainCommand, tmp_path: Path) -> None:
    file, run = tmp_path / "ids.npy", tmp_path / "run"
    np.save(file, np.random.default_rng(0).integers(0, 300, (24, 17)))
    data = ["data=tokens", f"data.path={file}"]
    outcome = commands.train(run, *data, "train.sequence_length=null", "train.steps=1")
    assert yaml.safe_load((run / "config.yaml").read_text())["train"]["sequence_length"] == 16
    assert "task=evaluate" in outcome.err + outcome.out + (run / "log.txt").read_text()
    outcome = commands.run(*data, "train.sequence_length=32")
    assert outcome.code == 2
    assert "train.sequence_length=32" in outcome.err
    assert "16" in outcome.err


BROKEN = injected({0: {"kind": "break"}})


def test_numbers_that_are_none_are_not_saved(commands: TrainCommand, tmp_path: Path) -> None:
    """The loss of the last step is still finite; its weights are not."""
    run = tmp_path / "run"
    with pytest.raises(AssertionError, match="not finite, so it is not saved"):
        commands.train(run, "train.stop_after=1", "train.evaluate_every=0", *BROKEN)
    assert not complete_steps(run)


def test_an_evaluation_that_is_not_finite_ends_the_run(commands: TrainCommand, tmp_path: Path) -> None:
    run = tmp_path / "run"
    with pytest.raises(AssertionError, match=r"step 1 is not finite: .*evaluation_loss nan"):
        commands.train(run, "train.steps=2", "train.evaluate_every=1", *BROKEN)
    assert json.loads((run / "metrics.jsonl").read_text())["evaluation_loss"] is None


def test_a_smaller_model_passes_for_the_stored_one_only_where_its_last_layers_are_left_out_by_name(
    commands: TrainCommand, first: Path
) -> None:
    data = ["data=text", f"data.path={commands.text}", "data.held_out=0.1"]
    command = ["task=evaluate", f"checkpoint.load={first}", *data]
    outcome = commands.run(*command, "model.moe.num_shared_experts=0")
    assert (outcome.code, "another model" in outcome.err) == (2, True)
    refused(commands.run(*command, "model.num_layers=1"), "leave these out too, model.mtp_depths=0")
    outcome = commands.must(*command, "model.num_layers=1", "model.mtp_depths=0")
    assert "model.num_layers 2 -> 1 (leaves out the last of 2 layers)" in outcome.err
    assert "model.mtp_depths 1 -> 0 (leaves out its MTP layer)" in outcome.err


def test_a_model_may_be_scored_without_its_mtp_layers(commands: TrainCommand, first: Path) -> None:
    data = ["data=text", f"data.path={commands.text}", "data.held_out=0.1", "train.sequence_length=32"]
    command = ["task=evaluate", f"checkpoint.load={first}", *data]
    whole = json.loads(commands.must(*command).out.splitlines()[-1])
    # The batch of evaluation obeys no law of training.
    assert json.loads(
        commands.must(*command, "model.mtp_depths=0", "train.microbatch_size=3").out.splitlines()[-1]
    ) == pytest.approx(whole, rel=1e-6)


def test_a_loss_that_is_not_finite_names_the_step_and_the_first_layer(
    commands: TrainCommand, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    with pytest.raises(AssertionError, match=r"step 2 is not finite: loss nan.*at the router of layers\.1"):
        commands.train(run, "train.steps=3", "train.evaluate_every=0", *BROKEN)
    assert not complete_steps(run)


@pytest.mark.parametrize("kernel", ["flex", "varlen"])
def test_a_kernel_that_cannot_train_here_is_refused(
    commands: TrainCommand, tmp_path: Path, kernel: str
) -> None:
    with pytest.raises(AssertionError, match=rf"model\.attention\.kernel={kernel} is not possible"):
        commands.train(tmp_path / "run", f"model.attention.kernel={kernel}")
    assert not (tmp_path / "run").exists()
