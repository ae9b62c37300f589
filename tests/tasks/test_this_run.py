"""The block at the start of a run: every fact with its reason, once, in the log and in this_run.txt."""

import json
from pathlib import Path

import pytest
import yaml

from dsv3.checkpoint.directory import MODEL_FILE, find_checkpoint
from tests.convert.releases import small_model, write_release
from tests.harness.checkpoints import unseal
from tests.harness.commands import TrainCommand
from tests.harness.tiny import MODEL, TRAINING, VOCAB

pytestmark = pytest.mark.slow

QUIET = ["train.evaluate_tokens=64", "train.checkpoint_every=0", "train.generate_every=0"]


def blocks(text: str) -> list[dict[str, str]]:
    """Return the facts of every block in a text by their subjects, going-on lines joined by `; `."""
    found: list[dict[str, str]] = []
    inside = False
    for line in text.splitlines():
        if line == "This run:":
            found.append({})
            inside = True
        elif inside and line.startswith("  "):
            subject, value = line[2:15].strip(), line[15:].strip()
            last = subject or next(reversed(found[-1]))
            found[-1][last] = f"{found[-1][last]}; {value}" if last in found[-1] else value
        else:
            inside = False
    return found


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Texts with a duplicate, an empty file and one that is not UTF-8."""
    folder = tmp_path / "texts"
    folder.mkdir()
    for number in range(40):
        (folder / f"{number:02}.txt").write_text(f"number {number} of some texts to train on\n" * 9)
    (folder / "again.txt").write_text((folder / "07.txt").read_text())
    (folder / "empty.txt").touch()
    (folder / "latin.txt").write_bytes("caf\xe9".encode("latin-1"))
    return folder


def test_a_run_tells_what_it_took_and_a_resume_what_goes_on(
    commands: TrainCommand, folder: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    data = ["data=text", f"data.path={folder}", "data.max_skipped=0.05"]
    first = commands.must(
        *MODEL,
        *TRAINING,
        *QUIET,
        *data,
        "train.steps=3",
        "train.batch_ramp.start=2",
        "train.batch_ramp.tokens=100",
        "schedule.warmup_steps=1",
        "train.stop_after=2",
        f"run.dir={run}",
    )
    stored = json.loads((run / "environment.json").read_text())["data"]
    (told,) = blocks(first.out)
    assert (run / "this_run.txt").read_text().splitlines() == first.out.splitlines()[
        : len((run / "this_run.txt").read_text().splitlines())
    ]
    assert blocks((run / "log.txt").read_text()) == [told]
    assert told["model"].startswith("debug: ")
    assert f"changed: model.vocab_size={VOCAB} " in told["model"]
    assert told["weights"] == "initial ones of train.seed=0"
    texts, sides, rows = told["data"].split("; ", 2)[0], *told["data"].split("; ")[2:4]
    assert texts == (
        f"text {folder}: {stored['tokens_train'] + stored['tokens_held_out']:,} tokens in 41 documents of "
        "43 files of text (a file is a document), 1 duplicate dropped, 1 empty, "
        "the largest, 10.txt, has 2.5% of the text"
    )
    assert told["data"].split("; ")[1] == "skipped 1 document: not UTF-8, first latin.txt"
    assert sides == f"training {stored['documents_train']} documents, {stored['tokens_train']:,} tokens"
    assert f"held out {stored['documents_held_out']} documents, {stored['tokens_held_out']:,} tokens" == rows
    per_epoch, left_out = stored["rows_per_epoch"], stored["tokens_left_out"]
    assert 0 < left_out == stored["tokens_train"] - 1 - 32 * per_epoch
    assert f"{per_epoch:,} rows of 32 tokens per epoch, {left_out} tokens too few for a row" in told["data"]
    assert f"3 steps take 8 rows, {8 / per_epoch:.2f} epochs" in told["data"]
    ids, document = told["tokenizer"].split("; ")
    assert ids.endswith(f"{stored['vocabulary']} ids, and the model's vocabulary has {VOCAB}")
    assert document == "a document is <|begin_of_sentence|> text <|end_of_sentence|>"
    assert told["tokenizer"].startswith("trained on the training side, ")
    assert told["batch"] == (
        "4 sequences x 32 tokens = 128 tokens per step; ramp from 2 to 4 sequences by 2 over the first 100 "
        "tokens (train.batch_ramp.start); step 3 is the first of the whole batch"
    )
    micro = "2 sequences per rank (at most about 4,096 tokens), 2 per step (gradient accumulation)"
    assert told["microbatch"] == micro  # the first step has 2 sequences
    assert told["layout"] == "none: 1 rank of cpu"
    assert told["precision"] == "fp32: no GPU was found"
    assert told["attention"].startswith(
        "blocks of queries: model.attention.kernel=auto, and the device is a CPU"
    )
    assert told["optimizer"].startswith("adamw, peak learning rate 0.003, weight decay 0.1")
    assert told["schedule"].startswith("warmup_cosine, 1 step of warm-up")
    assert told["biases"] == "expert biases move by 0.001 per step until step 2"
    assert told["MTP loss"] == "1 depth, weight 0.3 until step 2, then 0.1"
    assert told["checkpoints"] == "at the end; the newest 2 stay"
    assert told["logger"] == "none"
    record = yaml.safe_load((run / "checkpoints" / "step-2" / "training.yaml").read_text())
    assert told["convergence"].startswith(record["convergence"])

    again = blocks(commands.must(f"resume={run}").out)
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["tokens"] for row in metrics] == [64, 128, 256]  # of batches of 2, 2 and 4 rows
    assert all(row["data_wait"] >= 0 for row in metrics)
    assert "from step 3 on the batch has 4 sequences" in first.out
    assert again[0]["weights"] == f"those of the run: it goes on after step 2 of 3 in {run}"
    assert again[0]["tokenizer"].startswith("that of the run: ")
    assert blocks((run / "this_run.txt").read_text()) == [told, *again]


def test_json_lines_typed_keys_groups_and_samples_are_told(commands: TrainCommand, tmp_path: Path) -> None:
    lines = tmp_path / "texts.jsonl"
    lines.write_text("".join(json.dumps({"text": f"number {n} of some texts"}) + "\n" for n in range(400)))
    typed = ["optimizer=muon", "optimizer.adamw_lr_scale=0.5", "optimizer.frozen=[embedding.weight]"]
    often = ["train.evaluate_tokens=64", "train.steps=4", "schedule.warmup_steps=1", "train.stop_after=2"]
    data = ["data=text", f"data.path={lines}"]
    sampled = [*often, "train.generate_every=2"]
    first = commands.must(*MODEL, *TRAINING, *data, *sampled, *typed, f"run.dir={tmp_path / 'run'}")
    (told,) = blocks(first.out)
    assert " tokens in 400 documents of 1 file of JSON lines (data.field=text), " in told["data"]
    assert {*typed[:2], "train.generate_every=2"} <= set(told["typed"].replace(";", "").split())
    assert all(len(line) < 130 for line in first.out.splitlines() if line.startswith("  typed"))
    assert "by AdamW: 0.5 times the rate, betas [0.9,0.95]" in told["optimizer"]
    assert "parameters are trained" in told["optimizer"]
    assert first.out.count("sample for ") == 1  # of step 2, which is the last of this command
    assert "2 of 4, " in first.out
    assert "(first " not in first.out.split("Done")[1]
    assert told["samples"] == "every 2 steps and at the end, at most 30 s each"
    assert told["evaluation"].startswith("every 100 steps and at the end, 2 of ")
    assert told["evaluation"].endswith("held-out rows, spread evenly (train.evaluate_tokens=null scores all)")
    never = commands.must(f"resume={tmp_path / 'run'}", "train.generate_every=0", "train.evaluate_every=0")
    assert "sample for " not in never.out
    (told,) = blocks(never.out)
    assert told["evaluation"] == "never (train.evaluate_every=0)"
    assert told["samples"] == "never (train.generate_every=0)"
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["evaluation_loss"] for row in rows] == [None] * 4
    assert "held-out" not in never.out.split("Done")[1]


def test_a_fine_tune_of_a_released_model_tells_what_stays_and_what_is_left_out(
    commands: TrainCommand, tmp_path: Path
) -> None:
    release, run = tmp_path / "release", tmp_path / "run"
    write_release(release, small_model(f"model.vocab_size={VOCAB}"))
    settings = [*TRAINING, *QUIET, "data=text", f"data.path={commands.text}", "precision=fp32"]
    typed = ["model.mtp_depths=0", "train.steps=2", "train.stop_after=1", "schedule.warmup_steps=1"]
    (told,) = blocks(commands.must(f"checkpoint.load=hf:{release}", *settings, *typed, f"run.dir={run}").out)
    assert told["model"].startswith(f"that of hf:{release}: ")
    assert told["weights"] == f"those of checkpoint.load=hf:{release}; step 0 and a new optimizer"
    stay = f"expert biases stay as they are (hf:{release} is a released model)"
    assert told["biases"] == f"{stay}: train.balance.bias_speed=0.001 moves them"
    assert told["MTP loss"] == "none; the checkpoint has 1 depth, left out here"
    assert told["batch"] == "4 sequences x 32 tokens = 128 tokens per step"
    assert told["precision"] == "fp32: as configured"
    release.rename(tmp_path / "gone")
    (again,) = blocks(commands.must(f"resume={run}").out)
    assert again["biases"].startswith("expert biases stay as they are")


def test_weights_without_a_model_of_their_own_are_told_under_a_typed_one(
    commands: TrainCommand, tmp_path: Path
) -> None:
    settings = [*QUIET, "precision=fp32", "train.stop_after=1", "model.mtp_depths=0"]
    commands.train(tmp_path / "run", *settings)
    step = find_checkpoint(str(tmp_path / "run"))
    (step / MODEL_FILE).unlink()
    unseal(step)
    told = commands.train(tmp_path / "on", *settings, "model=debug", f"checkpoint.load={step}").out
    assert "MTP loss" not in blocks(told)[0]


def test_fp8_and_masked_documents_tell_their_engine_and_kernel(
    commands: TrainCommand, tmp_path: Path
) -> None:
    chosen = ["precision=fp8", "precision.fp8.engine=emulated", "data.document_mask=true"]
    outcome = commands.train(tmp_path / "run", *chosen, "train.steps=1", *QUIET, "train.stop_after=1")
    (told,) = blocks(outcome.out)
    assert told["precision"] == "fp8: as configured"
    assert told["FP8 engine"] == (
        "emulated: precision.fp8.engine=emulated on cpu; products are emulated, the same numbers, slower"
    )
    assert told["attention"].endswith("documents are masked")
    assert told["biases"].startswith("expert biases move by 0.01 per step")
