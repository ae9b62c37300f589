"""task=fit: what a world trains, the smallest world that trains a model, and commands that plan it."""

import json
import shlex
from typing import Any

import pytest

from dsv3.launch.job import plan_job
from dsv3.planning.hardware import named_hardware
from dsv3.tasks import fit
from tests.harness.commands import TrainCommand
from tests.harness.composing import strict_config

Row = dict[str, Any]


def fitted(commands: TrainCommand, *typed: str) -> Row:
    told: Row = json.loads(commands.must("task=fit", "task.format=json", *typed).out)
    return told


def assert_planned(run: Row) -> None:
    words = shlex.split(run["command"])
    plan = plan_job(strict_config(words[words.index("task=plan") :]), []).plan
    told = plan.to_json()
    assert told["memory_bytes"] == run["memory_bytes"]
    assert told["tokens_per_second_per_gpu"] == pytest.approx(run["tokens_per_second_per_gpu"])
    assert told["fits"]
    assert plan.shape.sequence_length == run["sequence_length"]
    assert plan.time is not None
    assert run["days_per_billion_tokens"] == pytest.approx(1e9 / plan.time.tokens_per_second / 86400)


def test_every_member_of_the_family_is_told_on_a_world(
    commands: TrainCommand, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fit, "LENGTHS", (4096, 131072))
    cheap = ("precision=bf16", "parallel=fsdp", "recompute=full")
    told = fitted(commands, "launch.world_size=8", "hardware=h200", *cheap)
    models = {row["model"]: row for row in told["models"]}
    assert list(models) == ["16b", "moonlight_16b", "236b", "671b", "kimi_k2"]
    assert models["16b"]["fits"]
    assert models["16b"]["runs"][-1]["sequence_length"] == models["16b"]["longest_sequence_length"]
    for row in told["models"]:
        for run in row["runs"]:
            assert_planned(run)
    large = models["671b"]
    assert not large["fits"]
    # The world is the smallest of those that double: half of it is refused, and it is not.
    world = large["smallest_world"]
    typed = ("task=search", "model=671b", "hardware=h200", "train.sequence_length=4096", "task.top=1", *cheap)
    assert commands.run(*typed, f"launch.world_size={world // 2}").code == 2
    commands.must(*typed, f"launch.world_size={world}")


def test_a_model_is_told_on_every_kind_of_gpu(commands: TrainCommand) -> None:
    told = fitted(commands, "model=16b", "parallel=fsdp", "precision=bf16", "recompute=full")
    assert [row["name"] for row in told["hardware"]] == [gpu.name for gpu in named_hardware()]
    for row in told["hardware"]:
        assert_planned(row["run"])
        assert f"hardware={row['name']}" in row["run"]["command"]


def test_a_family_needs_a_world(commands: TrainCommand) -> None:
    outcome = commands.run("task=fit", "hardware=h200")
    assert outcome.code == 2
    assert "no world is given" in outcome.err
