"""task=search: its commands plan what they tell, typed keys stay, and errors name what works."""

import json
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest

from dsv3.launch.job import plan_job
from dsv3.planning.layout import check_wrappers
from dsv3.tasks import search
from tests.harness.commands import TrainCommand
from tests.harness.composing import strict_config

Row = dict[str, Any]

SMALL = (
    "model.num_layers=4",
    "model.mtp_depths=1",
    "train.sequence_length=1024",
    "train.global_batch_size=16",
)


def searched(commands: TrainCommand, *typed: str) -> Row:
    before = set(sys.modules)
    outcome = commands.must("task=search", "task.format=json", *typed)
    assert "torch" not in set(sys.modules) - before
    told: Row = json.loads(outcome.out)
    return told


def planned(row: Row, world: int) -> Row:
    words = shlex.split(row["command"])
    assert words[-1] == f"launch.world_size={world}"
    config = strict_config(words[words.index("task=plan") :])
    job = plan_job(config, [])
    # A task that builds the model accepts it too: every degree has its wrapper.
    check_wrappers(config.parallel, job.plan.degrees)
    return job.plan.to_json()


def test_every_command_plans_the_memory_and_the_speed_that_it_is_printed_with(commands: TrainCommand) -> None:
    typed = ("launch.world_size=8", "hardware=h800", "recompute=full", "optimizer.fused=true", "task.top=4")
    told = searched(commands, *SMALL, *typed)
    assert told["global_batch_size"] == 16
    assert told["global_batch_reason"] == "as typed"
    assert len(told["best"]) == 4
    assert len(told["front"]) >= 2
    for row in [*told["best"], *told["front"]]:
        plan = planned(row, 8)
        assert plan["degrees"] == row["degrees"]
        assert plan["memory_bytes"] == row["memory_bytes"]
        assert plan["tokens_per_second_per_gpu"] == pytest.approx(row["tokens_per_second_per_gpu"])
        assert row["recompute"] == "full"
        assert "optimizer.fused=true" in row["overrides"]
    speeds = [row["tokens_per_second_per_gpu"] for row in told["best"]]
    assert speeds == sorted(speeds, reverse=True)


@pytest.mark.parametrize(
    ("typed", "holds"),
    [
        ("parallel.degrees.tp=2", lambda row: row["degrees"]["tp"] == 2),
        ("precision=fp8", lambda row: row["precision"] == "fp8"),
        ("train.microbatch_size=2", lambda row: row["microbatch_size"] == 2),
        ("recompute.mode=selective", lambda row: row["recompute"] == "selective"),
        ("parallel.reshard_after_forward=false", lambda row: row["reshard_after_forward"] is False),
        ("parallel=pp parallel.schedule=DualPipeV", lambda row: row["schedule"] == "DualPipeV"),
        ("parallel=pp", lambda row: row["degrees"]["pp"] > 1 and row["degrees"]["cp"] == 1),
        ("parallel=hsdp", lambda row: row["degrees"]["dp_replicate"] > 1 and row["degrees"]["pp"] == 1),
        ("parallel=tp_ep", lambda row: row["degrees"]["tp"] > 1 and row["degrees"]["dp_replicate"] == 1),
        ("parallel=fsdp parallel.degrees.pp=auto", lambda row: row["degrees"]["tp"] == 1),
    ],
)
def test_what_is_typed_stays(commands: TrainCommand, typed: str, holds) -> None:  # type: ignore[no-untyped-def]
    few = ("launch.world_size=4", "hardware=h100", "task.top=2")
    told = searched(commands, *SMALL, *few, *typed.split())
    assert all(map(holds, [*told["best"], *told["front"]]))
    row = told["best"][0]
    plan = planned(row, 4)
    assert plan["memory_bytes"] == row["memory_bytes"]
    assert plan["tokens_per_second_per_gpu"] == pytest.approx(row["tokens_per_second_per_gpu"])


def test_without_a_typed_batch_it_is_the_reports(commands: TrainCommand) -> None:
    few = (
        "launch.world_size=64",
        "hardware=h100",
        "parallel=pp",
        "task.top=1",
        "recompute=full",
        "precision=bf16",
    )
    told = searched(
        commands,
        "model=671b",
        *few,
        "parallel.degrees.pp=16",
        "parallel.schedule=1F1B",
        "hardware.memory_bytes=1e12",
    )
    assert (told["global_batch_size"], told["sequence_length"]) == (15360, 4096)
    assert "DeepSeek-V3" in told["global_batch_reason"]


@pytest.mark.parametrize(
    ("typed", "words"),
    [
        (["hardware=h100"], "no world is given: name the number of GPUs, such as launch.world_size=64"),
        (
            ["launch.world_size=4", "hardware=cpu"],
            "hardware=cpu has no known speed to rank layouts by: name a GPU",
        ),
        (["launch.world_size=4", "hardware=h100", "parallel.degrees.tp=3"], "no layout of 4 ranks is legal"),
        (
            ["launch.world_size=2", "hardware=h100", "hardware.memory_bytes=60000000", "recompute=full"],
            "no layout of 2 ranks fits hardware=h100: the closest needs",
        ),
        (["launch.world_size=2", "hardware=h100", "task.top=0"], "task.top=0"),
        (
            ["launch.world_size=2", "hardware=h100", "train.steps=5"],
            "train.steps=5 does nothing with task=search",
        ),
        (
            ["launch.world_size=2", "hardware=h100", "task.picture=a.jpg"],
            "must be a file name that ends in .png",
        ),
    ],
)
def test_what_cannot_be_searched_is_refused_in_two_lines(
    commands: TrainCommand, typed: list[str], words: str
) -> None:
    outcome = commands.run("task=search", *SMALL, *typed)
    assert outcome.code == 2
    assert outcome.out == ""
    message = outcome.err[outcome.err.index("error: ") :]
    assert words in message
    assert len(message.splitlines()) <= 2
    assert len(message) < 500
    if "smallest world that fits is" in message:
        world = message.split("launch.world_size=")[-1].split(",")[0]
        larger = [word for word in typed if not word.startswith("launch")]
        commands.must("task=search", *SMALL, *larger, f"launch.world_size={world}", "task.top=1")


def test_the_picture_is_written_and_the_text_names_every_command(
    commands: TrainCommand, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    few = ("launch.world_size=2", "hardware=h100", "task.top=3", "parallel=fsdp")
    outcome = commands.must("task=search", *SMALL, *few, "task.picture=front.png")
    assert (tmp_path / "front.png").read_bytes().startswith(b"\x89PNG")
    assert outcome.out.count("task=plan model.num_layers=4") >= 4
    commands.must("task=search", *SMALL, *few, "task.picture=new/folder/front.png")
    assert (tmp_path / "new" / "folder" / "front.png").is_file()
    (tmp_path / "file").write_text("")
    refused = commands.run("task=search", *SMALL, *few, "task.picture=file/front.png")
    assert refused.code == 2
    assert refused.out == ""
    assert "task.picture=file/front.png cannot be written" in refused.err
    assert "searching" not in refused.err


def test_several_processes_find_what_one_finds(
    commands: TrainCommand, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("task=search", *SMALL, "launch.world_size=8", "hardware=h100", "task.format=json")
    one = json.loads(commands.must(*words).out)
    monkeypatch.setattr(search, "LARGE", 1)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1})
    several = json.loads(commands.must(*words).out)
    assert several.pop("planned") >= one.pop("planned")
    assert several == one


def test_a_search_whose_process_dies_is_told(commands: TrainCommand, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search, "LARGE", 1)
    monkeypatch.setattr(search, "_search_part", abs)  # ends with an error
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1})
    outcome = commands.run("task=search", *SMALL, "launch.world_size=8", "hardware=h100")
    assert outcome.code == 1
    assert "a process of the search has died" in outcome.err
