"""task=compare: the order and state of the runs, the table, the reference and the picture."""

import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from dsv3.config.task import CompareTaskConfig, OutputFormat
from dsv3.errors import UserError
from dsv3.launch.run_results import State, differing_overrides, find_runs, held_out_differences
from dsv3.launch.sweep import mark_failed
from dsv3.metrics.console import format_table
from dsv3.metrics.row import MetricsRow
from dsv3.tasks.compare import CompareTask
from tests.harness.commands import PlannedCommand
from tests.harness.processes import ROOT

NAME = 'sweep, it\'s = "one" $HOME (1)'


def store(folder: Path, overrides: list[str], losses: list[float], held_out: float | None = None) -> None:
    """Write a run of 3 steps that took one step per loss; the last step has the held-out loss."""
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump({"train": {"steps": 3}}))
    (folder / "overrides.yaml").write_text(yaml.safe_dump(["train.steps=3", *overrides]))
    rows = [
        MetricsRow(step=step, tokens=step * 10, loss=loss, tokens_per_second=100.0 * step)
        for step, loss in enumerate(losses, 1)
    ]
    if rows:
        rows[-1].evaluation_loss = held_out
    (folder / "metrics.jsonl").write_text("".join(row.to_json() + "\n" for row in rows))


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    """Write six jobs: two done, one of them far better, two failed, one unevaluated and one stopped."""
    directory = tmp_path / NAME
    store(directory / "0", ["optimizer.lr=1e-3"], [5.0, 4.0, 3.0], 3.5)
    store(directory / "2", ["optimizer.lr=3e-3"], [5.0, 3.0, 2.0], 2.5)
    store(directory / "10", ["optimizer.lr=6e-3"], [5.0, 4.5])
    store(directory / "3", ["optimizer.lr=9e-3"], [5.0, 4.0, 3.5])
    store(directory / "4", ["optimizer.lr=1"], [9.0], 4.0)
    mark_failed(directory / "4", "step 2 is not finite", ["optimizer.lr=1"])
    mark_failed(directory / "5", "train.steps=0 is not possible", ["train.steps=0"])
    (directory / "0" / "wandb" / "files").mkdir(parents=True)
    (directory / "0" / "wandb" / "config.yaml").write_text("")
    return directory


def test_jobs_are_sorted_by_held_out_loss_and_told_apart(sweep: Path) -> None:
    runs = find_runs(sweep)
    found = [(run.directory.name, run.held_out, run.loss, run.step, run.state) for run in runs]
    assert found == [
        ("2", 2.5, 2.0, 3, State.done),
        ("0", 3.5, 3.0, 3, State.done),
        ("4", 4.0, 9.0, 1, State.failed),
        ("3", None, 3.5, 3, State.no_evaluation),
        ("5", None, None, 0, State.failed),
        ("10", None, 4.5, 2, State.stopped),
    ]
    assert differing_overrides(runs) == ["train.steps", "optimizer.lr"]
    assert differing_overrides(runs[:2]) == ["optimizer.lr"]
    runs[0].overrides["run.dir"] = "elsewhere"
    assert differing_overrides(runs[:2]) == ["optimizer.lr"]
    assert runs[0].tokens_per_second == 200.0
    assert [run.directory.name for run in find_runs(sweep.parent)] == ["2", "0", "4", "3", "5", "10"]


def test_a_run_that_went_on_to_its_end_is_done_whatever_failed_before(sweep: Path) -> None:
    mark_failed(sweep / "0", "killed", [])
    assert next(run for run in find_runs(sweep) if run.directory.name == "0").state is State.done


def test_a_run_that_turned_nonfinite_at_its_last_step_has_failed(sweep: Path) -> None:
    mark_failed(sweep / "3", "step 3: the loss is nan", [])
    assert next(run for run in find_runs(sweep) if run.directory.name == "3").state is State.failed


def words(line: str) -> str:
    return " ".join(line.split())


def snapshot(sweep: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for run in sweep.glob("*/") for path in run.rglob("*")}


def test_the_table_and_the_picture(sweep: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = snapshot(sweep)
    CompareTask(str(sweep), None, OutputFormat.text).run(None)  # type: ignore[arg-type]
    titles, best, *_ = lines = capsys.readouterr().out.splitlines()
    assert words(titles) == "job overrides held-out loss train loss steps tokens/s state"
    assert words(best) == "2 train.steps=3 optimizer.lr=3e-3 2.5000 2.0000 3/3 200 done"
    assert words(lines[6]) == "10 train.steps=3 optimizer.lr=6e-3 - 4.5000 2/3 150 stopped"
    assert lines[7:] == [
        "4 failed: step 2 is not finite",
        "5 failed: train.steps=0 is not possible",
        f"curves: {sweep}/compare.png",
    ]
    assert (sweep / "compare.png").read_bytes().startswith(b"\x89PNG")
    assert snapshot(sweep) == before


def test_the_table_is_plain_text_with_every_cell_whole_and_in_its_column(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "20")
    rows = [["2", "model=[bold] " + "x" * 300, "1,234"], ["10", "a\x1b[31mb :smile:", "-"]]
    table = format_table(rows, ["job", "overrides", "tokens/s"], left_aligned=("job", "overrides"))
    steered = "a\ufffd[31mb :smile:"
    assert table.split("\n") == [
        f"job  {'overrides':<313}  tokens/s",
        f"2    {rows[0][1]}     1,234",
        f"10   {steered:<313}         -",
    ]


@pytest.mark.slow
def test_as_a_command_it_takes_any_path_and_imports_no_torch(sweep: Path, tmp_path: Path) -> None:
    arguments = ["task=compare", f"task.runs={NAME}", "task.format=json", "task.output=a, b's.png"]
    program = (
        "import runpy, sys\n"
        f"sys.argv = ['train.py', *{arguments!r}]\n"
        "try:\n"
        f"    runpy.run_path({str(ROOT / 'train.py')!r}, run_name='__main__')\n"
        "except SystemExit as end:\n"
        "    print(end.code, 'torch' in sys.modules, file=sys.stderr)\n"
    )
    command = [sys.executable, "-c", program]
    ended = subprocess.run(
        command, cwd=tmp_path, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert ended.stderr.splitlines()[-1] == "0 False"
    printed = json.loads(ended.stdout)
    assert printed["plot"] == "a, b's.png"
    assert (tmp_path / "a, b's.png").exists()
    assert printed["runs"][0] == {
        "job": "2",
        "directory": f"{NAME}/2",
        "overrides": {"train.steps": "3", "optimizer.lr": "3e-3"},
        "evaluation_loss": 2.5,
        "loss": 2.0,
        "step": 3,
        "steps": 3,
        "tokens_per_second": 200.0,
        "planned_tokens_per_second": None,
        "memory_gib": None,
        "planned_memory_gib": None,
        "state": "done",
        "reason": None,
        "largest_difference": None,
        "convergence": None,
        "data_changes": [],
        "damage": [],
    }
    assert printed["runs"][4]["reason"] == "train.steps=0 is not possible"


def test_a_reference_tells_how_far_the_others_are(sweep: Path, capsys: pytest.CaptureFixture[str]) -> None:
    CompareTask(str(sweep), None, OutputFormat.text, "0").run(None)  # type: ignore[arg-type]
    titles, *rows = map(words, capsys.readouterr().out.splitlines())
    assert titles.endswith("state farthest")
    # Losses of job 0 are 5, 4, 3; of 2: 5, 3, 2; of 3: 5, 4, 3.5; of 10: 5, 4.5; of 4: 9. Job 5 has none.
    farthest = {row.split()[0]: row.split()[-1] for row in rows[:6]}
    assert farthest == {
        "0": "0.0e+00",
        "2": "3.3e-01",
        "3": "1.7e-01",
        "10": "1.2e-01",
        "4": "8.0e-01",
        "5": "-",
    }
    with pytest.raises(UserError, match=r"task\.reference=7 is none of the jobs of .*: 2, 0, 4, 3, 5, 10"):
        CompareTask(str(sweep), None, OutputFormat.text, "7").run(None)  # type: ignore[arg-type]


def test_a_damaged_run_is_named_and_the_others_are_compared(
    sweep: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (sweep / "2" / "config.yaml").write_bytes(b"train: [\xff")
    (sweep / "3" / "metrics.jsonl").unlink()
    (sweep / "3" / "metrics.jsonl").mkdir()
    task = CompareTask(str(sweep), None, OutputFormat.json)
    with pytest.raises(UserError, match=r"2 of 6 runs \(2, 3\) lack what cannot be read.*config\.yaml"):
        task.run(None)  # type: ignore[arg-type]
    found = {run["job"]: run for run in json.loads(capsys.readouterr().out)["runs"]}
    assert len(found) == 6
    assert (found["0"]["evaluation_loss"], found["2"]["evaluation_loss"]) == (3.5, 2.5)
    assert "metrics.jsonl is a directory" in found["3"]["damage"][0]
    assert not found["0"]["damage"]


def test_runs_without_a_step_give_no_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store(tmp_path / "0", [], [])
    (tmp_path / "0" / "config.yaml").write_text("{}")
    CompareTask(str(tmp_path), None, OutputFormat.text).run(None)  # type: ignore[arg-type]
    _, row, last = capsys.readouterr().out.splitlines()
    assert words(row) == "0 - - 0/? - stopped"
    assert last == "no curves: no run has made a step"
    assert not (tmp_path / "compare.png").exists()


def test_a_directory_that_is_no_place_of_runs_is_a_mistake(sweep: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for directory, words in (
        (tmp_path / "missing", "is no directory"),
        (tmp_path / "empty", "holds no runs"),
        (sweep / "0", "is one run"),
    ):
        with pytest.raises(UserError, match=words):
            find_runs(directory)
    with pytest.raises(UserError, match=r"task\.output=.* cannot be written: .*; name another file"):
        CompareTask(str(sweep), str(tmp_path / "no" / "x.png"), OutputFormat.text).run(None)  # type: ignore[arg-type]


def test_one_run_is_sent_to_its_directory_where_that_compares(
    sweep: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(sweep)
    with pytest.raises(UserError) as refusal:
        find_runs(Path("0"))
    (told,) = shlex.split(str(refusal.value).partition("holds it, ")[2])
    assert told == f"task.runs={sweep}"
    assert len(find_runs(Path(told.partition("=")[2]))) > 1
    store(tmp_path / "alone" / "run", [], [1.0], 1.0)
    with pytest.raises(UserError, match="there is no other run in"):
        find_runs(tmp_path / "alone" / "run")


def store_data(folder: Path, loss: float | None, data: str = "d1", **changes: Any) -> None:
    """Write a run as `store` does, with what decides on its held-out data."""
    store(folder, [], [5.0, 4.0, 3.0], loss)
    train = {"steps": 3, "sequence_length": 32, "evaluate_tokens": None, "seed": 0}
    if "evaluate_batches" in changes:
        train["evaluate_batches"] = train.pop("evaluate_tokens") or changes["evaluate_batches"]
    train |= {key: changes[key] for key in train if key in changes}
    source = {"_target_": "dsv3.data.sources.TextData", "path": f"/texts/{data}", "held_out": 0.03}
    source |= {"document_mask": False}
    source |= {key: changes[key] for key in source if key in changes}
    tokenizer = {"_target_": "dsv3.tokens.tokenizer.TrainedTokenizer", "vocab_size": 300}
    config = {"train": train, "data": source, "tokenizer": tokenizer}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    if changes.get("older"):
        return
    told = {"fingerprint": data, "tokenizer_fingerprint": changes.get("tokenizer", "t1")}
    told["rows_held_out"], told["rows_evaluated"] = 20, changes.get("rows_evaluated", 20)
    environment = {"convergence": changes.get("convergence", "c" * 16), "data": told}
    (folder / "environment.json").write_text(json.dumps(environment))


MIXED = {
    "data": ({"data": "d2"}, "data is d1 in 0, d2 in 1"),
    "share": ({"held_out": 0.1}, "data.held_out is 0.03 in 0, 0.1 in 1"),
    "tokenizer": ({"tokenizer": "t2"}, "tokenizer is t1 in 0, t2 in 1"),
    "length": ({"sequence_length": 64}, "train.sequence_length is 32 in 0, 64 in 1"),
    "mask": ({"document_mask": True}, "data.document_mask is false in 0, true in 1"),
    "tokens": ({"evaluate_tokens": 288}, "train.evaluate_tokens is all in 0, 9 rows in 1"),
    "an older run": ({"data": "d2", "older": True}, "data is text /texts/d1 in 0, text /texts/d2 in 1"),
}


@pytest.mark.parametrize(("changes", "words"), MIXED.values(), ids=MIXED.keys())
def test_runs_of_other_held_out_data_are_ranked_when_that_is_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, Any], words: str
) -> None:
    store_data(tmp_path / "0", 3.0)
    store_data(tmp_path / "1", 2.0, **changes)
    with pytest.raises(UserError) as refusal:
        CompareTask(str(tmp_path), None, OutputFormat.text).run(None)  # type: ignore[arg-type]
    first, second = str(refusal.value).splitlines()
    assert first == f"the runs of {tmp_path} cannot be ranked, their held-out data differ: {words}"
    assert second.startswith("task.mixed_data=true ranks them")
    CompareTask(str(tmp_path), None, OutputFormat.text, mixed_data=True).run(None)  # type: ignore[arg-type]
    titles, best, other, *_ = capsys.readouterr().out.splitlines()
    assert "held-out data" in titles
    key = words.partition(" ")[0]
    assert best.startswith("1 ")
    assert f"{key}={words.rsplit(' in ', 1)[0].rsplit(', ', 1)[1]}" in best
    assert f"{key}=" in other


def test_equal_held_out_data_are_ranked_and_unknown_or_unevaluated_ones_do_not_count(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store_data(tmp_path / "0", 3.0)
    store_data(tmp_path / "1", 2.0, evaluate_tokens=None, seed=1, convergence="e" * 16)
    store_data(tmp_path / "2", None, "d2", sequence_length=64)  # has no held-out loss
    store(tmp_path / "3", [], [5.0], 4.0)  # says nothing
    assert not held_out_differences(find_runs(tmp_path))
    CompareTask(str(tmp_path), None, OutputFormat.text).run(None)  # type: ignore[arg-type]
    lines = capsys.readouterr().out.splitlines()
    assert words(lines[0]).endswith("state convergence")
    assert [line.split()[-1] for line in lines[1:5]] == ["e" * 16, "c" * 16, "-", "c" * 16]


def test_limits_that_score_the_same_rows_are_the_same_data(tmp_path: Path) -> None:
    for number, tokens in enumerate((None, 640, 650)):  # all of 20 rows of 32
        store_data(tmp_path / "all" / str(number), 3.0, evaluate_tokens=tokens)
    assert not held_out_differences(find_runs(tmp_path / "all"))
    for number, tokens in enumerate((288, 300, 319)):
        store_data(tmp_path / "nine" / str(number), 3.0, evaluate_tokens=tokens)
    assert not held_out_differences(find_runs(tmp_path / "nine"))
    # A run of older code limited batches, and scored the first rows: as many are not the same.
    store_data(tmp_path / "nine" / "3", 3.0, evaluate_batches=3, rows_evaluated=9)
    told = {"0": "9 rows", "1": "9 rows", "2": "9 rows", "3": "the first 9 rows"}
    assert held_out_differences(find_runs(tmp_path / "nine")) == {"train.evaluate_tokens": told}


def test_differences_are_of_what_is_learnt_or_of_how_it_is_computed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store_data(tmp_path / "0", 3.0)
    store_data(tmp_path / "1", 2.0, seed=1, convergence="e" * 16)
    config = yaml.safe_load((tmp_path / "1" / "config.yaml").read_text())
    config |= {"logger": {"name": "seed=1"}, "compile": {"enabled": True}}
    (tmp_path / "1" / "config.yaml").write_text(yaml.safe_dump(config))
    CompareTask(str(tmp_path), None, OutputFormat.text).run(None)  # type: ignore[arg-type]
    lines = capsys.readouterr().out.splitlines()
    assert "differences in what is learnt: train.seed" in lines
    assert "differences in how it is computed alone: compile.enabled" in lines
    CompareTask(str(tmp_path), None, OutputFormat.json).run(None)  # type: ignore[arg-type]
    printed = json.loads(capsys.readouterr().out)
    assert [run["convergence"] for run in printed["runs"]] == ["e" * 16, "c" * 16]
    assert printed["differences"] == [
        {"key": "train.seed", "kind": "learnt", "values": {"0": 0, "1": 1}},
        {"key": "compile.enabled", "kind": "computed", "values": {"0": "absent", "1": True}},
    ]
    assert printed["held_out_data"] == {}


def test_the_key_that_the_refusal_names_is_one_that_can_be_typed(
    planned: PlannedCommand, tmp_path: Path
) -> None:
    typed = ["task=compare", f"task.runs={tmp_path}", "task.mixed_data=true"]
    task = planned.run(*typed).job.config.task
    assert isinstance(task, CompareTaskConfig)
    assert task.mixed_data
