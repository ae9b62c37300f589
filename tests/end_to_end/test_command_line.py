"""Every command as a user types it: from a directory of their own, into one with an awkward name."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.harness.processes import ROOT, CommandLine, rows
from tests.harness.tiny import MODEL

NAME = 'runs, it\'s = "one" $HOME (1)'


def test_a_run_is_trained_evaluated_sampled_and_gone_on_with_from_anywhere(command_line: CommandLine) -> None:
    run_dir = command_line.directory / NAME
    trained = command_line.run(*command_line.training(Path(NAME), "train.steps=3"))
    assert trained.code == 0, trained.err
    assert [row["step"] for row in rows(run_dir)] == [1, 2, 3]

    ranks = ["parallel=fsdp", "launch.nproc=2", "train.evaluate_tokens=64"]
    evaluated = command_line.run(
        "task=evaluate", f"checkpoint.load={NAME}", *ranks, "train.microbatch_size=1"
    )
    assert evaluated.code == 0, evaluated.err
    result = json.loads(evaluated.out.splitlines()[-1])
    assert result["loss"] == pytest.approx(rows(run_dir)[-1]["evaluation_loss"], rel=1e-6)

    prompt = 'w1, "w2" = $w3 (it\'s)\\'
    sampled = command_line.run(
        "task=generate", f"checkpoint.load={NAME}", f"task.prompt={prompt}", "task.max_tokens=3"
    )
    assert sampled.code == 0, sampled.err
    assert sampled.out.startswith(prompt)

    other = command_line.run(f"resume={NAME}", "model.moe.top_k=1")
    assert other.code == 2
    assert "a run keeps its model" in other.err
    assert len(other.err.splitlines()) <= 2
    again = command_line.run(f"resume={NAME}", "train.steps=4")
    assert again.code == 0, again.err
    assert [row["step"] for row in rows(run_dir)] == [1, 2, 3, 4]
    assert {path.name for path in command_line.directory.iterdir()} == {NAME, ".stdout", ".stderr"}


def test_a_sweep_makes_a_run_of_every_job_and_tells_the_bad_one(command_line: CommandLine) -> None:
    arguments = command_line.training(Path("unused"), "train.steps=1,0,2")[:-1]
    swept = command_line.run("-m", *arguments)
    assert swept.code == 1
    assert "job 1 failed: train.steps=0 is not possible" in swept.err
    assert "Traceback" not in swept.err
    (sweep,) = (command_line.directory / "multirun").iterdir()
    for number, steps in (("0", 1), ("2", 2)):
        config = yaml.safe_load((sweep / number / "config.yaml").read_text())
        assert config["train"]["steps"] == steps
        assert [row["step"] for row in rows(sweep / number)] == list(range(1, steps + 1))
    assert not (sweep / "1" / "config.yaml").exists()


def test_a_plan_is_one_json_object_and_needs_no_torch(command_line: CommandLine) -> None:
    layout = ["model=671b", "parallel=fsdp", "launch.world_size=2048", "hardware=h800", f"run.dir={NAME}"]
    program = (
        "import runpy, sys\n"
        f"sys.argv = ['train.py', *{['task=plan', 'task.format=json', *layout]!r}]\n"
        "try:\n"
        f"    runpy.run_path({str(ROOT / 'train.py')!r}, run_name='__main__')\n"
        "except SystemExit as end:\n"
        "    heavy = {'torch', 'transformers', 'wandb', 'tokenizers'} & set(sys.modules)\n"
        "    print(end.code, sorted(heavy), file=sys.stderr)\n"
    )
    environment = {**command_line.environment, "PYTHONPATH": str(ROOT)}
    finished = subprocess.run(
        [sys.executable, "-c", program],
        cwd=command_line.directory, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert finished.stderr.splitlines() == ["0 []"]
    plan = json.loads(finished.stdout)
    assert set(plan) == {
        *("degrees", "world_size", "parameters", "parameters_active", "memory_bytes", "device_memory_bytes"),
        *("fits", "traffic_bytes", "traffic_between_nodes", "bubble", "tokens_per_second_per_gpu"),
        *("mfu", "mfu_full_square", "time", "time_source", "flops_per_token"),
        *("precision", "precision_reason", "between_steps", "run"),
    }
    assert plan["precision"] == "bf16"
    assert set(plan["memory_bytes"]) == {"parameters", "gradients", "optimizer", "activations", "total"}
    assert plan["parameters"] == 682_636_472_320
    assert plan["world_size"] == plan["degrees"]["dp_shard"] == 2048
    assert plan["device_memory_bytes"] == 80_000_000_000
    assert not list(command_line.directory.iterdir())


@pytest.mark.parametrize(
    ("mistake", "words"),
    [
        ("modle=debug", "unknown key 'modle'. Did you mean 'model'?"),
        ("--foo", "--help"),
        ("resume=nowhere", "does not exist: give the directory of a run"),
        ("hardware=h100 model=671b", "do not fit"),
    ],
)
def test_a_mistake_leaves_with_2_and_leaves_nothing_behind(
    command_line: CommandLine, mistake: str, words: str
) -> None:
    ended = command_line.run(*MODEL[:1], *mistake.split())
    assert ended.code == 2
    assert words in ended.err
    assert ended.out == ""
    assert len(ended.err.splitlines()) <= 2
    assert {path.name for path in command_line.directory.iterdir()} == {".stdout", ".stderr"}
