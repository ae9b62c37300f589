"""The texts of --help: groups with what they are for, and a choice with its keys."""

import os
import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest

from dsv3.cli.help import train_help
from dsv3.config.registry import CONF, config_groups
from tests.harness.commands import PlannedCommand


def test_every_group_and_node_is_listed_with_what_it_is_for() -> None:
    lines = train_help("train.py").splitlines()
    for group, choices in config_groups().items():
        (number,) = (n for n, line in enumerate(lines) if line.startswith(f"  {group} "))
        assert lines[number].endswith(".")
        assert len(lines[number]) <= 110
        assert lines[number + 1].replace("*", "").split() == choices
    for node in ("train", "checkpoint", "run"):
        assert any(line.startswith(f"  {node} ") and line.endswith(".") for line in lines)


GROUPS = config_groups()


# Composing takes half a second: each round explains one choice of every group.
@pytest.mark.parametrize("number", range(max(map(len, GROUPS.values()))))
def test_every_choice_is_explained(number: int) -> None:
    chosen = [f"{group}={choices[number % len(choices)]}" for group, choices in GROUPS.items()]
    text = train_help("train.py", [*chosen, "--help"])
    starts = {choice: text.index(f"{choice}: ") for choice in chosen}
    ends = dict(pairwise([*sorted(starts.values()), len(text)]))
    for choice, start in starts.items():
        first, *keys = text[start : ends[start]].rstrip().splitlines()
        assert len(first) > len(choice) + 10
        assert keys
        assert all(len(line) <= 110 for line in keys) or choice.startswith("experiments=")


def test_keys_have_the_values_of_the_choice_and_their_descriptions() -> None:
    text = train_help("train.py", ["model=671b", "parallel=pp", "task=generate", "task.prompt=it's, so"])
    rows = [line.split(maxsplit=1) for line in text.splitlines() if re.match(r"  \w+\.\w", line)]
    found = {row[0]: " ".join(row[1].split()) for row in rows}
    assert found["model.dim"] == "7168 Width of the residual stream."
    assert found["model.moe.top_k"] == "8 Routed experts per token."
    assert found["parallel.degrees.pp"].startswith("16 ")  # of conf/layouts.yaml
    assert found["task.prompt"] == "it's, so Text to continue."
    assert "optimizer.lr" not in found


def test_a_value_that_must_be_given_is_marked() -> None:
    text = train_help("train.py", ["model=hf"])
    assert "model.dim                            required  Width of the residual stream." in text


def test_a_choice_of_ones_own_is_explained(tmp_path: Path) -> None:
    (tmp_path / "optimizer").mkdir()
    (tmp_path / "optimizer" / "mine.yaml").write_text(
        "defaults:\n  - /schema/optimizer/adamw@_here_\n  - _self_\n\n# My own numbers.\nlr: 0.5\n"
    )
    text = train_help("train.py", [f"--config-dir={tmp_path}", "optimizer=mine", "--help"])
    assert text.startswith("optimizer=mine: My own numbers.\n\n  optimizer.lr            0.5 ")


@pytest.mark.parametrize(
    ("typed", "told"),
    [
        ("task=generte", "task=generte is not a choice. Did you mean 'generate'?"),
        ("task=generate,plan", "are several values"),
    ],
)
def test_a_mistyped_choice_is_told_in_one_line(planned: PlannedCommand, typed: str, told: str) -> None:
    outcome = planned.run(typed, "--help")
    assert (outcome.code, outcome.out, outcome.jobs) == (2, "", [])
    assert told in outcome.err
    assert len(outcome.err.splitlines()) == 1


def test_help_imports_no_torch() -> None:
    program = (
        "import sys; from dsv3.cli.help import train_help; text = train_help('train.py', ['task=generate']);"
        "print({'torch', 'numpy', 'wandb', 'transformers'} & set(sys.modules), 'task.prompt' in text)"
    )
    environment = {**os.environ, "PYTHONPATH": str(CONF.parent)}
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    assert run.stdout == "set() True\n", run.stderr
