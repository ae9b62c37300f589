"""task=prepare from the command line: the input found, the tokenizer made, the table, and what is refused."""

import errno
import json
from pathlib import Path

import numpy as np
import pytest

from dsv3.errors import RunFailed
from dsv3.tasks import prepare as task
from dsv3.tasks.prepare import unescape
from dsv3.tokens import prepare_shards
from dsv3.tokens.shard_index import HELD_OUT, TRAIN, ShardIndex
from dsv3.tokens.tokenizer import Tokenizer, TrainedTokenizer
from tests.data.texts import sentence
from tests.harness.commands import TrainCommand
from tests.harness.outcome import Outcome

TEXTS = [sentence(number) for number in range(60)]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Return a folder with JSON lines, a text file with separators, and a tokenizer beside it."""
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "a.jsonl").write_text("".join(json.dumps({"body": text}) + "\n" for text in TEXTS[:40]))
    (folder / "b.txt").write_text("\n\n<>".join(TEXTS[40:]))
    TrainedTokenizer(300).prepare(TEXTS).save(tmp_path / "tokenizer")
    return folder


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> TrainCommand:
    return TrainCommand(capsys, tmp_path)


def arguments(source: Path, *more: str) -> list[str]:
    given = {
        "task": "prepare",
        "task.input": f"{source}/*",
        "task.output": str(source.parent / "out"),
        "data.field": "body",
        "data.separator": "\\n\\n<>",
        "tokenizer": "local",
        "tokenizer.path": str(source.parent / "tokenizer"),
    }
    given |= dict(override.split("=", 1) for override in more)
    return [f"{key}={value}" for key, value in given.items() if value]


def refused(outcome: Outcome, *words: str) -> None:
    assert outcome.code == 2, outcome.err
    for word in words:
        assert word in outcome.err
    assert outcome.err.count("\n") <= 4


def test_a_command_prepares_and_tells(source: Path, command: TrainCommand) -> None:
    told = command.must(*arguments(source)).out
    out = source.parent / "out"
    index = ShardIndex.read(out)
    rows = dict(line.split("  ", 1) for line in told.strip().splitlines())
    assert rows["documents"].strip() == "60"
    assert rows["skipped"].strip() == "nothing"
    assert f"{index.num_tokens(TRAIN):,} tokens of {index.num_documents(TRAIN):,}" in rows["to train on"]
    assert f"data=shards data.path={out}" in rows["written"]
    assert index.num_documents(TRAIN) + index.num_documents(HELD_OUT) == 60
    given = Tokenizer.from_file(source.parent / "tokenizer")
    assert index.tokenizer is not None
    assert (
        index.tokenizer.fingerprint
        == given.fingerprint()
        == Tokenizer.from_file(out / "tokenizer").fingerprint()
    )
    assert index.settings["separator"] == "\n\n<>"
    assert index.source["files"] == 2
    # The same command again does nothing, another one is refused.
    before = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    assert "is prepared already" in command.must(*arguments(source)).out
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == before
    refused(
        command.run(*arguments(source, "data.held_out=0.1")), "shards of another command", "data.held_out"
    )
    (source / "b.txt").write_text("other")
    refused(command.run(*arguments(source)), "shards of another command", "different: input")


def test_a_model_trains_on_what_was_prepared(source: Path, command: TrainCommand) -> None:
    command.must(*arguments(source, "data.held_out=0.2"))
    out = source.parent / "out"
    (out / "unfinished").mkdir()  # as a kill between the index and the end leaves it
    told = command.train(source.parent / "run", "data=shards", f"data.path={out}", "train.steps=1")
    assert "60 documents" in told.err or told.code == 0


def test_a_tokenizer_is_trained_on_a_sample(
    source: Path, command: TrainCommand, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(task, "SAMPLE_CHARACTERS", 2000)
    trained = ["tokenizer=trained", "tokenizer.path=", "tokenizer.vocab_size=280"]
    real = TrainedTokenizer.prepare
    texts: list[str] = []

    def prepare(self: TrainedTokenizer, given: object, cache: object = None) -> Tokenizer:
        texts.extend(given)  # type: ignore[arg-type]
        return real(self, texts)

    monkeypatch.setattr(TrainedTokenizer, "prepare", prepare)
    monkeypatch.setattr(prepare_shards, "run_units", stop)
    assert command.run(*arguments(source, *trained)).code != 0
    assert 0 < sum(map(len, texts)) <= 2000
    monkeypatch.undo()
    out = source.parent / "out"
    # No journal says what the kept tokenizer was trained for: it is trained again.
    command.must(*arguments(source, *trained))
    index = ShardIndex.read(out)
    assert index.vocab_size == 280
    assert Tokenizer.from_file(out / "tokenizer").size == 280


def stop(*args: object, **kwargs: object) -> None:
    raise RunFailed("stopped")


def test_skips_beyond_the_bound_are_refused_until_allowed(source: Path, command: TrainCommand) -> None:
    with (source / "a.jsonl").open("a") as file:
        file.write('{"text": "x"}\nno JSON\n' + json.dumps({"body": "one more"}) + "\n")
    refused(
        command.run(*arguments(source)),
        "2 of 63 documents cannot be read, more than data.max_skipped=0.01",
        "a.jsonl: line 41 (it has 'text')",
        "a.jsonl: line 42",
        "Mend or remove them",
        "data.max_skipped=0.04",
    )
    assert not (source.parent / "out").exists()
    told = command.must(*arguments(source, "data.max_skipped=0.04")).out
    assert "1 document: no JSON, first" in told
    assert ShardIndex.read(source.parent / "out").skipped == {"the field is missing": 1, "no JSON": 1}


def test_a_wrong_field_leaves_nothing_that_is_in_the_way(source: Path, command: TrainCommand) -> None:
    only = f"task.input={source}/a.jsonl"
    deep = source.parent / "some" / "deep"
    wrong = (only, "data.field=text", f"task.output={deep}")
    refused(command.run(*arguments(source, *wrong)), "it has 'body'", "Name the field")
    assert not deep.parent.exists()
    command.must(*arguments(source, only))


def test_an_output_that_cannot_be_written_is_told_before_anything_is_done(
    source: Path, command: TrainCommand, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreached(*args: object, **how: object) -> None:
        raise AssertionError("the input was looked at")

    monkeypatch.setattr(task, "find_files", unreached)
    refused(command.run(*arguments(source, f"task.output={source}/a.jsonl/x")), "cannot be written")

    class Full:
        def __enter__(self) -> "Full":
            return self

        def __exit__(self, *_: object) -> None: ...

        def write(self, content: bytes) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("tempfile.TemporaryFile", lambda **_: Full())
    refused(command.run(*arguments(source)), "No space left", "make room")
    assert not (source.parent / "out").exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (["task.input="], ["task.input", "give files, folders"]),
        (["task.output="], ["task.output", "give a folder"]),
        (["task.workers=0"], ["task.workers=0", "above 0"]),
        (["data.max_skipped=2"], ["data.max_skipped=2", "at most 1"]),
        (["data.held_out=0.7"], ["data.held_out=0.7"]),
        (["data.separator=''"], ["data.separator"]),
        (["task.input={}/none"], ["task.input", "does not exist"]),
        (["task.input={}/empty"], ["holds no document", "1 empty"]),
        (["task.output={}"], ["task.output", "is not empty"]),
        (["task.output={}/a.jsonl/x"], ["task.output", "cannot be written", "Not a directory"]),
        (["tokenizer.path={}"], ["tokenizer.path", "holds no tokenizer"]),
        (["train.steps=3"], ["does nothing with task=prepare"]),
        (["data=stdlib", "data.field=", "data.separator="], ["leave data=... out"]),
    ],
)
def test_mistakes_are_told(change: list[str], words: list[str], source: Path, command: TrainCommand) -> None:
    if "empty" in change[0]:
        (source / "empty").mkdir()
        (source / "empty" / "nothing.txt").touch()
    refused(command.run(*arguments(source, *(each.format(source) for each in change))), *words)


def test_data_input_is_nothing_to_train_on(command: TrainCommand) -> None:
    refused(command.run("data=input", "train.steps=1", "logger=none"), "data=shards data.path=DIR")


def test_separators_are_read_as_typed() -> None:
    assert unescape(None) is None
    assert unescape("\\n\\t--\\\\n\\x") == "\n\t--\\n\\x"


def test_no_held_out_side_where_none_is_wanted(source: Path, command: TrainCommand) -> None:
    command.must(*arguments(source, "data.held_out=0"))
    index = ShardIndex.read(source.parent / "out")
    assert index.num_documents(TRAIN) == 60
    assert index.splits[HELD_OUT] == []
    assert np.load(source.parent / "out" / index.splits[TRAIN][0].offsets).dtype == np.int64
