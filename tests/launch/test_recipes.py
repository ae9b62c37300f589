"""A released model brings its report's recipe; typed keys and studies win, and the run says what it took."""

from typing import Any

import pytest
import yaml

from dsv3.config.convergence import flatten
from dsv3.config.registry import CONF, SCHEMAS, recipes
from dsv3.config.strict import to_yaml
from dsv3.planning.batch_schedule import BatchSchedule
from dsv3.planning.report import format_plan
from dsv3.training.schedule import build_schedule
from tests.config.test_choices import MODELS
from tests.harness.commands import PlannedCommand
from tests.harness.composing import strict_config
from tests.harness.runs import StoredRun

FITTING = ("model=16b", "parallel=fsdp", "hardware=h100", "precision=bf16", "recompute=full", "logger=none")


def test_every_released_model_has_a_recipe_with_its_source() -> None:
    assert set(recipes()) == set(MODELS)
    for row in recipes().values():
        keys = {"source", "optimizer", "schedule", "train", "report", "batch"}
        assert set(row) - {"recipe_schedule"} == keys
        assert "arXiv" in row["source"]


@pytest.mark.parametrize("model", MODELS)
def test_the_model_brings_its_recipe_and_the_debug_model_keeps_the_defaults(model: str) -> None:
    config, row = strict_config([f"model={model}"]), recipes()[model]
    has = flatten(to_yaml(config))
    for node in ("optimizer", "schedule", "train"):
        assert row[node].items() <= {key: has[f"{node}.{key}"] for key in row[node]}.items()
    assert config.optimizer.lr < 1e-3
    shape = dict(row.get("recipe_schedule", {"choice": "warmup_cosine"}))
    assert isinstance(config.schedule, SCHEMAS[f"schedule/{shape.pop('choice')}"])
    assert {key: getattr(config.schedule, key) for key in shape} == shape
    debug = strict_config([])
    assert (debug.optimizer.lr, debug.schedule.warmup_steps, debug.train.steps) == (3e-3, 20, 300)
    assert isinstance(debug.schedule, SCHEMAS["schedule/warmup_cosine"])


def test_what_is_typed_or_studied_wins_over_the_recipe() -> None:
    typed = strict_config(["model=671b", "optimizer.lr=1e-3", "schedule=wsd", "train.steps=7"])
    assert (typed.optimizer.lr, typed.train.steps, typed.schedule.warmup_steps) == (1e-3, 7, 2000)
    assert isinstance(typed.schedule, SCHEMAS["schedule/wsd"])
    # The shares at which 236b's rate drops are of its own schedule alone.
    for override, shares in (("schedule=steps", [0.8, 0.9]), ("schedule.at=[0.5]", [0.5])):
        schedule: Any = strict_config(["model=236b", override]).schedule
        assert schedule.at == shares
    study = yaml.safe_load((CONF / "experiments" / "fp8_loss.yaml").read_text())
    assert strict_config(["model=671b", "experiments=fp8_loss"]).train.steps == study["train"]["steps"]


def test_a_run_says_what_it_took_and_what_the_report_did_beside_it(planned: PlannedCommand) -> None:
    took, beside, batch = planned.run(*FITTING, "optimizer.lr=1e-3").job.recipe
    assert took == (
        "DeepSeek-V2-Lite (arXiv 2405.04434, appendix B): schedule=steps optimizer.betas=[0.9,0.95] "
        "optimizer.weight_decay=0.1 schedule.warmup_steps=2000 train.steps=302000 train.clip_norm=1.0"
    )
    assert beside == (
        "the report also has 4,608 sequences of 4,096 tokens per step; this run has 8 sequences of 4,096 "
        "tokens per step: a small layout cannot hold the report's batch, so it is no default"
    )
    assert batch == "the report's batch: train.global_batch_size=4608"
    assert len(planned.run(*FITTING, "train.global_batch_size=4608").job.recipe) == 2
    assert "schedule=" not in planned.run(*FITTING, "schedule=wsd").job.recipe[0]
    job = planned.run("logger=none").job
    assert job.recipe == job.notes == []


def test_another_optimizer_keeps_its_own_learning_rate_and_a_long_warm_up_is_told(
    planned: PlannedCommand,
) -> None:
    overrides = ["model=16b", "train.steps=3"]
    assert strict_config(overrides).optimizer.lr == 4.2e-4
    job = planned.run(*FITTING, "train.steps=3").job
    assert any("warm" in note and "2000" in note for note in job.notes)
    assert "optimizer.lr=0.00042" in job.recipe[0]


@pytest.mark.parametrize(("model", "tokens"), [("236b", 8.1e12), ("671b", 14.8e12)])
def test_the_reports_ramp_is_planned_and_its_schedule_goes_by_tokens(
    planned: PlannedCommand, model: str, tokens: float
) -> None:
    ranks = "launch.world_size=2048"
    outcome = planned.run("task=plan", f"model={model}", "parallel=pp", ranks, *recipes()[model]["batch"])
    job = outcome.job
    plan: Any = job.plan.to_json()["run"]
    batch = BatchSchedule.of(job.config.train)
    assert batch.increment == batch.start
    step = batch.final * 4096
    assert 0 <= plan["tokens"] - tokens < 2 * step  # a round number of steps
    assert plan["batch_ramp"]["steps"] == batch.ramp_steps
    lines = {line.split("  ")[0]: line for line in format_plan(job.plan).splitlines()}
    assert f"{batch.first:,} to {batch.final:,} sequences by {batch.first:,} over" in lines["batch ramp"]
    assert f"{plan['steps']:,} steps, {plan['tokens']:,} tokens" in lines["run"]
    # The rate first falls behind 10T of 14.8T tokens, or 60 % of them, to a step.
    schedule = build_schedule(job.config)
    falls = 10e12 if model == "671b" else 0.6 * plan["tokens"]
    first = next(n for n in range(150_000 if model == "671b" else 120_000, 10**6) if schedule(n) < 1)
    assert abs(batch.samples_after(0, first) * 4096 - falls) < 2 * step
    assert schedule(2000) == 1


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


@pytest.mark.parametrize("model", MODELS)
def test_muon_takes_the_rate_and_the_decay_of_adamw_and_other_optimizers_keep_their_own(model: str) -> None:
    of_adamw, muon = (strict_config([f"model={model}", f"optimizer={name}"]) for name in ("adamw", "muon"))
    rates: list[Any] = [of_adamw.optimizer, muon.optimizer]
    assert rates[0].lr == rates[1].lr == recipes()[model]["optimizer"]["lr"]
    assert rates[0].weight_decay == rates[1].weight_decay
    assert strict_config([f"model={model}", "optimizer=sgd"]).optimizer.lr == 1e-3
