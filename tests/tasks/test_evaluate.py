"""task=evaluate: a checkpoint is scored on the data that it was trained on, and the output says on what."""

import json
import shlex
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from dsv3.tokens.tokenizer import TrainedTokenizer
from tests.data.token_formats import megatron
from tests.harness.checkpoints import seal
from tests.harness.commands import ConvertCommand, TrainCommand
from tests.harness.outcome import refused
from tests.harness.runs import rows
from tests.harness.tiny import TRAINING

pytestmark = pytest.mark.slow

SHORT = ["train.steps=2", "train.evaluate_every=1", "train.checkpoint_every=1"]


def result(commands: TrainCommand, checkpoint: Path | str, *arguments: str) -> dict[str, Any]:
    """Evaluate a checkpoint with nothing typed but `arguments`; return what the last line of stdout says."""
    outcome = commands.must("task=evaluate", f"checkpoint.load={checkpoint}", *arguments)
    told: dict[str, Any] = json.loads(outcome.out.splitlines()[-1])
    return told


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    """A tokenizer on disk that begins documents with a token of an unusual name."""
    TrainedTokenizer(290).prepare(f"w{number} w{number + 1}\n" for number in range(60)).save(tmp_path / "own")
    config = tmp_path / "own" / "tokenizer_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"bos_token": "<|pad|>"}))
    return tmp_path / "own"


@pytest.fixture
def ids(tmp_path: Path) -> Path:
    """A table of ids."""
    np.save(tmp_path / "ids.npy", np.random.default_rng(0).integers(0, 300, (40, 17)))
    return tmp_path / "ids.npy"


def test_the_loss_of_a_step_is_the_one_that_the_run_measured_there(
    commands: TrainCommand, tmp_path: Path
) -> None:
    run, alone = tmp_path / "run", tmp_path / "alone"
    settings = ["train.sequence_length=24", "data.document_mask=true", "data.held_out=0.3"]
    commands.train(run, *SHORT, *settings, "train.microbatch_size=2")
    first, last = (row["evaluation_loss"] for row in rows(run))
    assert first != last
    (run / "checkpoints" / "step-1").rename(alone)
    for checkpoint, loss in ((run, last), (alone, first)):
        told = result(commands, checkpoint)
        assert (told["loss"], told["comparable"]) == (loss, True)


def train_without(commands: TrainCommand, run: Path, left_out: list[str], *arguments: str) -> None:
    """Train as `commands.train` does without some of its settings, which belong to another choice."""
    kept = [setting for setting in TRAINING if setting.split("=")[0] not in left_out]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tests.harness.commands.TRAINING", kept)
        commands.train(run, *arguments)


def test_every_copy_of_the_weights_is_scored_on_the_data_of_its_run(
    commands: TrainCommand, convert: ConvertCommand, tmp_path: Path, tokenizer: Path
) -> None:
    run, dcp, back = tmp_path / "run", tmp_path / "dcp", tmp_path / "back"
    settings = ["tokenizer=local", f"tokenizer.path={tokenizer}", "data.held_out=0.3"]
    every = ["train.steps=2", "train.export_hf_every=2", "train.sequence_length=24"]
    train_without(commands, run, ["tokenizer.vocab_size"], *settings, *every)
    shutil.rmtree(tokenizer)  # each copy carries it
    export = run / "hf" / "step-2"
    convert.must("hf_to_dcp", export, dcp, "dtype=fp32")
    convert.must("dcp_to_hf", dcp, back, "dtype=bf16")
    whole = result(commands, run)
    assert whole["loss"] == rows(run)[-1]["evaluation_loss"]
    for checkpoint in (f"hf:{export}", dcp, f"hf:{back}"):
        told = result(commands, checkpoint)
        assert told["loss"] == pytest.approx(whole["loss"], rel=2e-3)  # an export is bf16
        assert told["weights"] == ("fp32" if checkpoint == dcp else "bf16")
        varying = {"loss", "perplexity", "checkpoint", "weights"}
        assert {k: told[k] for k in told.keys() - varying} == {k: whole[k] for k in told.keys() - varying}


@pytest.fixture(scope="module")
def _finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("finished") / "run"


@pytest.fixture
def run(commands: TrainCommand, _finished: Path) -> Path:
    """Train a run in bf16 on a copy of the texts, which tests must not change."""
    if not _finished.exists():
        text = Path(shutil.copytree(commands.text, _finished.with_name("text")))
        commands.train(_finished, *SHORT, "precision=bf16", f"data.path={text}")
    return _finished


def test_the_table_and_the_json_say_what_was_scored(commands: TrainCommand, run: Path) -> None:
    outcome = commands.must("task=evaluate", f"checkpoint.load={run}")
    told = json.loads(outcome.out.splitlines()[-1])
    environment = json.loads((run / "environment.json").read_text())["data"]
    assert list(told)[:3] == ["loss", "perplexity", "tokens"]
    assert {name: told[name] for name in list(told)[3:]} == {
        "checkpoint": str(run / "checkpoints" / "step-2"),
        "data": "text",
        "data_path": str(run.with_name("text")),
        "data_fingerprint": environment["fingerprint"],
        "held_out": 0.1,
        "sequence_length": 32,
        "document_mask": False,
        "precision": "fp32",
        "tokenizer": "trained",
        "tokenizer_fingerprint": environment["tokenizer_fingerprint"],
        "weights": "fp32",
        "comparable": True,
        "run_precision": "bf16",
    }
    table = {line[2:19].strip(): line[19:] for line in outcome.err.splitlines() if line.startswith("  ")}
    assert table["data"] == f"text {told['data_path']}, 0.1 held out, fingerprint {told['data_fingerprint']}"
    assert table["sequence length"] == "32"
    assert table["document mask"] == "off"
    assert table["precision"] == "fp32"
    assert table["tokenizer"].endswith(f"ids, fingerprint {told['tokenizer_fingerprint']}")
    assert table["tokens"] == f"{told['tokens']:,}"


def test_the_precision_that_a_line_names_gives_the_loss_of_the_run(commands: TrainCommand, run: Path) -> None:
    loss = rows(run)[-1]["evaluation_loss"]
    outcome = commands.must("task=evaluate", f"checkpoint.load={run}")
    assert json.loads(outcome.out.splitlines()[-1])["loss"] != loss
    assert "the run computed in bf16: precision=bf16 gives its losses" in outcome.err
    again = commands.must("task=evaluate", f"checkpoint.load={run}", "precision=bf16")
    assert json.loads(again.out.splitlines()[-1])["loss"] == loss
    assert "the run computed" not in again.err


def test_what_is_typed_is_scored_and_told_apart_from_the_run(commands: TrainCommand, run: Path) -> None:
    typed = ["data.held_out=0.2", "train.sequence_length=16", "train.evaluate_tokens=64"]
    outcome = commands.must("task=evaluate", f"checkpoint.load={run}", *typed)
    told = json.loads(outcome.out.splitlines()[-1])
    assert (told["held_out"], told["sequence_length"], told["comparable"]) == (0.2, 16, False)
    line = outcome.err.splitlines()[-2]
    assert line == (
        "not comparable with the losses of the run: data.held_out 0.2 (the run: 0.1), "
        "train.sequence_length 16 (the run: 32), train.evaluate_tokens 4 rows (the run: all)"
    )


def test_data_that_has_changed_is_not_taken_for_that_of_the_run(
    commands: TrainCommand, run: Path, tmp_path: Path
) -> None:
    text = Path(shutil.copytree(commands.text, tmp_path / "text"))
    assert result(commands, run, f"data.path={text}")["comparable"]
    (text / "more.txt").write_text("one more document\n" * 20)
    outcome = commands.must("task=evaluate", f"checkpoint.load={run}", f"data.path={text}")
    old, new = (
        json.loads((run / "environment.json").read_text())["data"]["fingerprint"],
        json.loads(outcome.out.splitlines()[-1])["data_fingerprint"],
    )
    assert f"not comparable with the losses of the run: data {new} (the run: {old})" in outcome.err


def test_data_that_is_gone_is_named_with_what_to_type(
    commands: TrainCommand, run: Path, tmp_path: Path
) -> None:
    text = run.with_name("text")
    text.rename(tmp_path / "moved")
    try:
        outcome = commands.run("task=evaluate", f"checkpoint.load={run}")
        refused(outcome, f"checkpoint.load={run} was trained on data.path={text}", "data.path=PATH")
        told = result(commands, run, f"data.path={tmp_path / 'moved'}")
    finally:
        (tmp_path / "moved").rename(text)
    assert told["comparable"]
    assert told["held_out"] == 0.1


@pytest.mark.parametrize(
    ("group", "target"),
    [("data", "os.system"), ("tokenizer", "subprocess.Popen"), ("data", "dsv3.errors.UserError")],
)
def test_a_checkpoint_cannot_choose_what_is_built(
    commands: TrainCommand, run: Path, tmp_path: Path, group: str, target: str
) -> None:
    step = Path(shutil.copytree(run / "checkpoints" / "step-2", tmp_path / "step"))
    record = yaml.safe_load((step / "training.yaml").read_text())
    record["config"][group]["_target_"] = target
    (step / "training.yaml").write_text(yaml.safe_dump(record))
    refused(commands.run("task=evaluate", f"checkpoint.load={step}"), "training.yaml is")  # by its manifest
    seal(step)
    refused(commands.run("task=evaluate", f"checkpoint.load={step}"), f"{group}._target_={target} is ")


def test_of_a_table_that_is_given_every_row_is_scored_and_of_a_runs_own_what_it_held_out(
    commands: TrainCommand, tmp_path: Path, ids: Path
) -> None:
    run = tmp_path / "run"
    data = ["data=tokens", f"data.path={ids}"]
    commands.train(run, *SHORT, *data, "train.sequence_length=null", "data.held_out=0.2")
    own = result(commands, run)
    assert (own["tokens"], own["loss"]) == (8 * 16, rows(run)[-1]["evaluation_loss"])
    assert result(commands, run, "data.held_out=0.4")["tokens"] == 16 * 16
    outcome = commands.must("task=evaluate", f"checkpoint.load={run}", *data)
    told = json.loads(outcome.out.splitlines()[-1])
    assert (told["tokens"], told["held_out"]) == (40 * 16, None)
    assert "data.held_out every row (the run: 0.2)" in outcome.err


def test_the_command_that_a_run_prints_reads_the_data_of_the_run(
    commands: TrainCommand, tmp_path: Path
) -> None:
    """Also where keys beside the path say what the data is, and where nothing held out has a target."""
    run, empty, random = tmp_path / "run", tmp_path / "empty", np.random.default_rng(0)
    table = random.integers(4, 300, (20, 17))
    table[:, 9:] = 3
    np.save(tmp_path / "pad.npy", table)
    data = ["data=tokens", f"data.path={tmp_path / 'pad.npy'}"]
    settings = [*SHORT, *data, "train.sequence_length=null", "data.held_out=0.2"]
    printed = commands.train(run, *settings, "data.pad_id=3").out.splitlines()
    following = shlex.split(printed[printed.index("next:") + 1])
    outcome = commands.must(*following[following.index("train.py") + 1 :])
    told = json.loads(outcome.out.splitlines()[-1])
    assert (told["tokens"], told["loss"]) == (4 * 8, rows(run)[-1]["evaluation_loss"])
    assert "the run: it had" not in outcome.err
    typed = commands.must("task=evaluate", f"checkpoint.load={run}", *data)
    assert "the run: it had data.pad_id=3, and so other tokens of the same files" in typed.err
    # Rows of one token have no target.
    table[:, 1:] = 3
    np.save(tmp_path / "pad.npy", table)
    out = commands.train(empty, *settings, "data.pad_id=3").out
    assert out.count("held-out loss unknown: no target in the held-out rows") == 1
    found = rows(empty)
    assert [(row["loss"], row["evaluation_loss"], row["alarm"]) for row in found] == [(None, None, 0)] * 2
    outcome = commands.must("task=evaluate", f"checkpoint.load={empty}")
    told = json.loads(outcome.out.splitlines()[-1])
    assert (told["loss"], told["perplexity"], told["tokens"]) == (None, None, 0)
    assert "unknown: no target in the held-out rows" in outcome.err
    compared = commands.must(
        "task=compare", f"task.runs={tmp_path}", "task.mixed_data=true", "task.format=json"
    )
    losses = {each["job"]: each["evaluation_loss"] for each in json.loads(compared.out)["runs"]}
    assert losses["empty"] is None
    assert losses["run"] is not None


def test_ids_of_another_tool_train_and_padding_is_no_target(commands: TrainCommand, tmp_path: Path) -> None:
    """Megatron's files without a tokenizer: a run of its own split, then typed ids that are scored whole."""
    random = np.random.default_rng(0)
    documents = [random.integers(1, 300, size).tolist() for size in random.integers(2, 40, 60)]
    path, run = megatron(tmp_path / "corpus", documents), tmp_path / "run"
    commands.train(run, *SHORT, "data=shards", f"data.path={path.with_suffix('')}", "data.held_out=0.2")
    own = result(commands, run)
    assert (own["loss"], own["comparable"]) == (rows(run)[-1]["evaluation_loss"], True)
    whole = result(commands, run, "data=shards", f"data.path={path}")
    assert (whole["tokens"], whole["held_out"]) == (sum(len(ids) - 1 for ids in documents), None)
    table = random.integers(1, 300, (20, 17))
    table[random.random(table.shape) < 0.3] = 0
    np.save(tmp_path / "padded.npy", table)
    padded = result(commands, run, "data=tokens", f"data.path={tmp_path / 'padded.npy'}", "data.pad_id=0")
    assert padded["tokens"] == sum(max(0, row - 1) for row in (table != 0).sum(1).tolist())
    # Of the places that a run counts as tokens, metrics and the table at its end tell the padding.
    given = ["data=tokens", f"data.path={tmp_path / 'padded.npy'}", "data.pad_id=0"]
    told = commands.train(tmp_path / "padded", *given, "train.steps=2", "train.sequence_length=null").out
    shares = [row["padding"] for row in rows(tmp_path / "padded")]
    assert all(0.1 < share < 0.5 for share in shares)
    assert [row["padding"] for row in rows(run)] == [0.0] * len(rows(run))
    assert f"tokens, {sum(shares) / 2:.1%} of them padding" in told
    assert "padding included" in told
    assert f"about {(table != 0).sum():,} tokens in 20 rows of 1 file" in told


def test_a_checkpoint_that_says_nothing_tells_what_is_used(
    commands: TrainCommand, run: Path, tmp_path: Path
) -> None:
    step = Path(shutil.copytree(run / "checkpoints" / "step-2", tmp_path / "dcp"))
    (step / "training.yaml").unlink()
    seal(step)
    typed = ["data=text", f"data.path={commands.text}", "train.sequence_length=32"]
    outcome = commands.must("task=evaluate", f"checkpoint.load={step}", *typed)
    told = json.loads(outcome.out.splitlines()[-1])
    assert (told["comparable"], told["run_precision"], told["tokenizer"]) == (None, None, "local")
    assert (
        f"checkpoint.load={step} does not say what it was trained on; used: data=text {commands.text}, "
        "0.03 of the documents held out, rows of 32 tokens, no document mask, "
        f"the tokenizer of {step}/tokenizer"
    ) in outcome.err.splitlines()


def test_a_run_that_goes_on_from_other_data_says_so(
    commands: TrainCommand, run: Path, tmp_path: Path
) -> None:
    text = Path(shutil.copytree(commands.text, tmp_path / "text"))
    begin = ["train.steps=1", "train.sequence_length=32", "logger=none", f"checkpoint.load={run}"]
    same = commands.must(*begin, "data=text", f"data.path={text}", f"run.dir={tmp_path / 'same'}")
    assert "was trained on" not in same.out
    (text / "more.txt").write_text("one more document\n" * 20)
    other = commands.must(*begin, "data=text", f"data.path={text}", f"run.dir={tmp_path / 'other'}")
    told = f"the checkpoint was trained on data=text {run.with_name('text')} (fingerprint "
    assert told in other.out
    assert f"this run trains on data=text {text} (fingerprint " in other.out
