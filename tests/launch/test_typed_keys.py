"""A typed key that a task does not read is refused; one that has no effect beside the others is told."""

from dataclasses import fields
from pathlib import Path

import pytest

from dsv3.config.registry import SCHEMAS
from dsv3.errors import UserError
from dsv3.launch.typed_keys import CONDITIONS, OFF, inert_notes, matches, refuse_unread
from tests.config.test_every_key import KEYS
from tests.harness.commands import PlannedCommand

pytestmark = pytest.mark.slow

UNREAD = {
    "evaluate": ["optimizer.lr=1", "schedule=wsd", "train.steps=3", "logger=wandb", "checkpoint.keep_last=3"],
    "generate": ["data.held_out=0.1", "train.sequence_length=8", "compile=on", "tokenizer.vocab_size=300"],
    "verify": ["precision=bf16", "checkpoint.load=x", "parallel=fsdp", "train={seed:1}"],
    "compare": ["model=16b", "experiments=learning_rate", "launch.nproc=2", "hardware=h100"],
}


@pytest.mark.parametrize("task", UNREAD)
def test_a_key_that_the_task_does_not_read_is_refused_in_one_line(planned: PlannedCommand, task: str) -> None:
    for override in UNREAD[task]:
        outcome = planned.run(f"task={task}", override)
        told = f"error: {override} does nothing with task={task}: leave it out\n"
        assert (outcome.code, outcome.err.splitlines()[-1:]) == (2, told.splitlines())
    outcome = planned.run(f"task={task}", *UNREAD[task][:2])
    assert " do nothing with task=" in outcome.err
    assert not list(Path.cwd().iterdir())


@pytest.mark.parametrize("task", ["train", "evaluate", "generate", "plan", "verify", "compare"])
def test_every_key_is_read_by_the_task_or_refused(task: str) -> None:
    schema = SCHEMAS[f"task/{task}"]
    for name in {key.name for key in KEYS if not key.name.startswith("task.")}:
        override = f"{name}=x"
        try:
            refuse_unread(schema, {override: (name, "x")})
            refused = False
        except UserError:
            refused = True
        assert refused is not schema.reads_key(name), name
    assert schema.reads_key("train.steps") is (task in ("train", "plan"))


def test_a_typed_node_is_read_key_by_key() -> None:
    schema = SCHEMAS["task/evaluate"]
    refuse_unread(schema, {"train={sequence_length:8}": ("train", "{sequence_length:8}")})
    mixed = "{sequence_length:8,clip_norm:2}"
    with pytest.raises(UserError, match="does nothing with task=evaluate"):
        refuse_unread(schema, {f"train={mixed}": ("train", mixed)})


def test_what_switches_something_off_holds_for_every_task(planned: PlannedCommand) -> None:
    for task in ("evaluate", "generate", "verify", "compare"):
        for group, choices in OFF.items():
            for choice in choices:
                refuse_unread(SCHEMAS[f"task/{task}"], {f"{group}={choice}": (group, choice)})


def test_values_of_an_experiment_are_not_typed(planned: PlannedCommand, tmp_path: Path) -> None:
    (tmp_path / "experiments").mkdir()
    text = "# @package _global_\noptimizer: {lr: 0.5}\nmodel: {num_layers: 3}\n"
    (tmp_path / "experiments" / "mine.yaml").write_text(text)
    command = (f"--config-dir={tmp_path}", "experiments=mine", "task=generate")
    assert planned.run(*command).job.config.model.num_layers == 3


INERT = {
    "parallel.schedule=GPipe": "one pipeline stage",
    "parallel.fsdp.prefetch=false parallel=fsdp launch.world_size=1 task=plan": "nothing to shard",
    "parallel.expert.backend=all_to_all parallel=fsdp task=plan": "ep=1",
    "model.rope.factor=40": "model.rope.scaling is none",
    "train.balance.bias_speed=1 model.moe.selection_bias=false": "no expert bias",
    "train.mtp_loss.weight=1 model.mtp_depths=0": "model.mtp_depths is 0",
    "train.stop_after=400": "the run ends before",
    "logger.project=x logger.mode=disabled": "logger.mode is disabled",
    "profile.steps=2": "profile is off",
    "compile.backend=aot_eager": "compile is off",
    "recompute.keep=[attention]": "recompute.mode is not selective",
    "launch.timeout=9": "one rank waits for nobody",
    "hardware.network.ring_intra=0.5": "one rank sends nothing",
    "optimizer=sgd optimizer.dampening=0.5": "optimizer.momentum is 0",
    "schedule=wsd schedule.decay=0 schedule.final=0.5": "schedule.decay is 0",
}


@pytest.mark.parametrize("typed", INERT)
def test_a_key_without_an_effect_in_this_job_is_told(planned: PlannedCommand, typed: str) -> None:
    notes = [note for note in planned.run(*typed.split()).job.notes if "nothing here" in note]
    assert len(notes) == 1
    assert INERT[typed] in notes[0]
    assert any(pair.partition("=")[0] in notes[0] for pair in typed.split())


@pytest.mark.parametrize(
    "typed",
    ["task=prepare task.input=x task.output=y data.held_out=0", "task=plan", "task=cache", "task=train"],
)
def test_nothing_is_told_of_keys_that_nobody_typed(planned: PlannedCommand, typed: str) -> None:
    assert not [note for note in planned.run(*typed.split()).job.notes if "nothing here" in note]
    [note] = [note for note in planned.run("task=cache", "run.dir=z").job.notes if "nothing here" in note]
    assert note.startswith("run.dir changes nothing here")


def test_a_key_with_an_effect_is_not_told(planned: PlannedCommand) -> None:
    acting = ["model.rope.scaling=yarn", "model.rope.factor=8", "profile=on", "profile.steps=2"]
    job = planned.run(*acting).job
    assert not [note for note in job.notes if "nothing here" in note]
    assert inert_notes(job, {"compile.backend=inductor": ("compile.backend", "inductor")})


def test_a_condition_names_keys_that_there_are() -> None:
    wrappers = {f"parallel.{field.name}" for field in fields(SCHEMAS["parallel"])}
    names = {key.name for key in KEYS} | {"tokenizer"} | wrappers
    for condition in CONDITIONS:
        for pattern in condition.keys:
            assert any(matches(name, [pattern]) for name in names), pattern
