"""A released model brings its report's recipe; typed keys and studies win, and the run says what it took."""

import pytest
import yaml

from dsv3.config.registry import CONF, recipes
from tests.config.test_choices import MODELS
from tests.harness.commands import PlannedCommand
from tests.harness.composing import strict_config
from tests.harness.runs import StoredRun

FITTING = ("model=16b", "parallel=fsdp", "hardware=h100", "precision=bf16", "recompute=full", "logger=none")


def test_every_released_model_has_a_recipe_with_its_source() -> None:
    assert set(recipes()) == set(MODELS)
    for row in recipes().values():
        assert set(row) == {"source", "optimizer", "schedule", "train", "report"}
        assert "arXiv" in row["source"]


@pytest.mark.parametrize("model", MODELS)
def test_the_model_brings_its_recipe_and_the_debug_model_keeps_the_defaults(model: str) -> None:
    config, row = strict_config([f"model={model}"]), recipes()[model]
    assert config.optimizer.lr == row["optimizer"]["lr"] < 1e-3
    assert config.schedule.warmup_steps == row["schedule"]["warmup_steps"]
    assert config.train.steps == row["train"]["steps"]
    debug = strict_config([])
    assert (debug.optimizer.lr, debug.schedule.warmup_steps, debug.train.steps) == (3e-3, 20, 300)


def test_what_is_typed_or_studied_wins_over_the_recipe() -> None:
    typed = strict_config(["model=671b", "optimizer.lr=1e-3", "schedule=wsd", "train.steps=7"])
    assert (typed.optimizer.lr, typed.train.steps, typed.schedule.warmup_steps) == (1e-3, 7, 2000)
    study = yaml.safe_load((CONF / "experiments" / "fp8_loss.yaml").read_text())
    assert strict_config(["model=671b", "experiments=fp8_loss"]).train.steps == study["train"]["steps"]


def test_a_run_says_what_it_took_and_what_the_report_did_beside_it(planned: PlannedCommand) -> None:
    took, beside = planned.run(*FITTING, "optimizer.lr=1e-3").job.notes
    assert took == (
        "recipe of model=16b, DeepSeek-V2-Lite (arXiv 2405.04434, appendix B): "
        "schedule.warmup_steps=2000 train.steps=302000"
    )
    assert beside.startswith("the report also has schedule=steps, 4,608 sequences")
    assert beside.endswith("this run has WarmupCosine, 8 sequences of 4,096 tokens per step")
    assert planned.run("logger=none").job.notes == []


def test_another_optimizer_keeps_its_own_learning_rate_and_a_long_warm_up_is_told(
    planned: PlannedCommand,
) -> None:
    overrides = ["model=16b", "train.steps=3"]
    assert strict_config(overrides).optimizer.lr == 4.2e-4
    long, took, _ = planned.run(*FITTING, "train.steps=3").job.notes
    assert long == "the warm-up is longer than the run: schedule.warmup_steps=2000, train.steps=3"
    assert "optimizer.lr=0.00042" in took


def test_a_recipe_cannot_be_typed(planned: PlannedCommand) -> None:
    outcome = planned.run("recipes=16b")
    assert outcome.code == 2
    assert "recipes cannot be set directly: model chooses it" in outcome.err


def test_a_run_goes_on_with_its_own_numbers_though_a_recipe_has_come_since(
    planned: PlannedCommand, stored: StoredRun
) -> None:
    directory = stored.store(*FITTING)
    config = yaml.safe_load((directory / "config.yaml").read_text())
    config["optimizer"]["lr"], config["schedule"]["warmup_steps"], config["train"]["steps"] = 2e-3, 11, 500
    (directory / "config.yaml").write_text(yaml.safe_dump(config))
    job = planned.run(f"resume={directory}").job
    train = job.config.train
    assert (job.config.optimizer.lr, job.config.schedule.warmup_steps, train.steps) == (2e-3, 11, 500)
    assert planned.run(f"resume={directory}", "optimizer.lr=1e-4").job.config.optimizer.lr == 1e-4
