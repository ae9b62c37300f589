"""Mistakes in the user's own YAML files: FILE:LINE, and what the command line would have been told."""

from pathlib import Path

import pytest

from dsv3.cli.user_files import UserFiles
from tests.harness.commands import PlannedCommand
from tests.harness.outcome import refused

pytestmark = pytest.mark.slow

GLOBAL = "# @package _global_\n"

MISTAKES: dict[str, tuple[str, list[str], str]] = {
    # Name: the file, what the message has of it, and the file as the message would have it.
    "bracket": (
        f"{GLOBAL}train:\n  steps: [1\n  foo: :\n",
        ["experiments/bracket.yaml:4: not YAML: expected ',' or ']'"],
        f"{GLOBAL}train:\n  steps: 1\n",
    ),
    "tab": (
        f"{GLOBAL}train:\n\tsteps: 1\n",
        ["tab.yaml:3: not YAML", r"'\t'"],
        f"{GLOBAL}train:\n  steps: 1\n",
    ),
    "twice": (
        f"{GLOBAL}train:\n  steps: 1\n  steps: 2\n",
        ["twice.yaml:4: not YAML", "duplicate key steps"],
        "",
    ),
    "tag": (f"{GLOBAL}train: !!python/object:os.system {{}}\n", ["tag.yaml:2: has the tag", "os.system"], ""),
    "latin": (f"{GLOBAL}# caf\xe9\n", ["latin.yaml:2: not UTF-8: byte 0xe9"], ""),
    "control": (f"{GLOBAL}train: \x01\n", ["control.yaml:2: not YAML: the character"], ""),
    "key": (
        f"{GLOBAL}train:\n  stepz: 3\n",
        ["experiments/key.yaml:3: unknown key 'train.stepz'. Did you mean 'train.steps'?"],
        f"{GLOBAL}train:\n  steps: 3\n",
    ),
    "node": (
        f"{GLOBAL}\ntrian:\n  steps: 3\n",
        ["experiments/node.yaml:3: unknown key 'trian'. Did you mean 'train'?"],
        f"{GLOBAL}\ntrain:\n  steps: 3\n",
    ),
    "kind": (
        f"{GLOBAL}train:\n  # as many\n  steps: abc\n",
        ["experiments/kind.yaml:4: train.steps=abc is not possible: must be a whole number"],
        f"{GLOBAL}train:\n  steps: 3\n",
    ),
    "choice_of_enum": (
        f"{GLOBAL}model:\n  rope:\n    scaling: yran\n",
        ["choice_of_enum.yaml:4: model.rope.scaling", "[none, yarn]"],
        f"{GLOBAL}model:\n  rope:\n    scaling: yarn\n",
    ),
    "value": (
        f"{GLOBAL}train:\n  steps: 0\n",
        ["experiments/value.yaml:3: train.steps=0 is not possible: must be above 0"],
        f"{GLOBAL}train:\n  steps: 1\n",
    ),
    "scalar": (f"{GLOBAL}train: 3\n", ["scalar.yaml:2: 3 stands where the keys of a node belong"], ""),
    "variable": (
        f"{GLOBAL}train:\n  steps: ${{foo}}\n",
        ["variable.yaml:3: train.steps", "'foo' not found"],
        "",
    ),
    "number": (
        f"{GLOBAL}data:\n  cache_dir: 1e10\n",
        ["experiments/number.yaml:3: data.cache_dir is a text, and YAML reads 1e10", '"1e10"'],
        f'{GLOBAL}data:\n  cache_dir: "1e10"\n',
    ),
    "truth": (
        f"{GLOBAL}defaults:\n- override /task: generate\ntask:\n  prompt: yes\n",
        ["experiments/truth.yaml:5: task.prompt is a text, and YAML reads yes as True", '"yes"'],
        f'{GLOBAL}defaults:\n- override /task: generate\ntask:\n  prompt: "yes"\n',
    ),
    "group": (
        f"{GLOBAL}defaults:\n  - override /modle: debug\n",
        ["experiments/group.yaml:3: there is no config group 'modle'. Did you mean 'model'?"],
        f"{GLOBAL}defaults:\n  - override /model: debug\n",
    ),
    "slash": (
        f"{GLOBAL}defaults:\n  - model: debug\n",
        ["experiments/slash.yaml:3: in a defaults list write `- override /model: debug`"],
        f"{GLOBAL}defaults:\n  - override /model: debug\n",
    ),
    "model": (
        f"{GLOBAL}defaults:\n  - override /model: debgu\n",
        ["experiments/model.yaml:3: model=debgu is not a choice. Did you mean 'debug'?"],
        f"{GLOBAL}defaults:\n  - override /model: debug\n",
    ),
    "no_list": (f"{GLOBAL}defaults: model\n", ["no_list.yaml: defaults must be a list"], ""),
    "header": (
        "train:\n  steps: 3\n",
        ["experiments/header.yaml: ", "begin the file with the line `# @package _global_`"],
        f"{GLOBAL}train:\n  steps: 3\n",
    ),
    "path": (
        f"{GLOBAL}train:\n  steps: ${{train.stop_aftr}}\n",
        ["path.yaml:3: train.steps", "its whole path", "Did you mean 'train.stop_after'?"],
        f"{GLOBAL}train:\n  steps: ${{train.log_every}}\n",
    ),
    "list": ("- a\n", ["list.yaml:1: a list stands where keys belong", GLOBAL.strip()], GLOBAL),
    "below": (f"{GLOBAL}- a\n", ["below.yaml:2: a list stands where keys belong"], GLOBAL),
    "word": ("3\n", ["word.yaml:1: a value stands where keys belong"], GLOBAL),
    "empty": ("", ["empty.yaml:1: nothing stands where keys belong", GLOBAL.strip()], GLOBAL),
}


def write(name: str, content: str, group: str = "experiments") -> None:
    """Write a file of a user's own config directory, `own`."""
    file = Path("own") / group / f"{name}.yaml"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(content, encoding="latin-1")


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_in_a_file_is_told_with_its_line_and_mended_as_told(
    planned: PlannedCommand, name: str
) -> None:
    content, told, mended = MISTAKES[name]
    command = ["task=plan", "logger=none", "--config-dir=own", f"experiments={name}"]
    write(name, content)
    refused(planned.run(*command), "error: own/experiments/", *told)
    if mended:
        write(name, mended)
        outcome = planned.run(*command[1:])
        assert outcome.code == 0, outcome.err


def test_files_that_files_name_are_found_too(planned: PlannedCommand) -> None:
    write("outer", f"{GLOBAL}defaults:\n  - inner\n  - override /optimizer: mine\n")
    write("inner", f"{GLOBAL}train:\n  steps: 0\n")
    write("mine", "defaults: [/schema/optimizer/adamw@_here_, _self_]\nlr: -1\n", "optimizer")
    command = ["logger=none", "--config-dir=own", "experiments=outer"]
    refused(planned.run(*command), "own/optimizer/mine.yaml:2: optimizer.lr=-1.0 is not possible")
    command.append("optimizer.lr=1")
    refused(planned.run(*command), "own/experiments/inner.yaml:3: train.steps=0 is not possible")
    # What is typed is not the file's mistake.
    refused(planned.run(*command, "train.steps=-1"), "error: train.steps=-1 is not possible")


def test_a_preset_of_ones_own_is_told_of_by_line(planned: PlannedCommand) -> None:
    write("mine", "defaults: [/schema/model@_here_, _self_]\nvocab_size: 512\ndimm: 3\n", "model")
    told = "own/model/mine.yaml:3: unknown key 'model.dimm'. Did you mean 'model.dim'?"
    refused(planned.run("logger=none", "--config-dir=own", "model=mine"), told)


def test_a_group_of_ones_own_is_added_with_a_plus(planned: PlannedCommand) -> None:
    write("x", f"{GLOBAL}train:\n  steps: 7\n", "ablation")
    command = ["logger=none", "--config-dir=own"]
    refused(planned.run(*command, "ablation=x"), "a + adds: +ablation=x")
    assert planned.run(*command, "+ablation=x").job.config.train.steps == 7
    refused(planned.run(*command, "+ablation=y"), "ablation=y is not a choice", "Choices: x")


def test_a_schema_of_no_group_is_not_sent_in_circles(
    planned: PlannedCommand, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("lost_group.py").write_text(
        "from dataclasses import dataclass\nfrom dsv3.config.registry import schema\n"
        "@schema('lost/x')\n@dataclass\nclass X:\n    a: int = 1\n"
    )
    monkeypatch.syspath_prepend(str(Path.cwd()))
    monkeypatch.setattr("dsv3.config.registry._CHOICES", {**_choices()})
    monkeypatch.setattr("dsv3.config.registry.SCHEMAS", {**_schemas()})
    command = ["logger=none", "run.allow_targets=lost_group"]
    refused(planned.run(*command, "lost=x"), "lost=x: there is no config group 'lost'", "Groups: ")
    refused(planned.run(*command, "+lost=x"), "unknown key 'lost'", "Known here: task, model")


def _choices() -> dict[str, dict[str, object]]:
    from dsv3.config import registry

    return {group: dict(choices) for group, choices in registry._CHOICES.items()}


def _schemas() -> dict[str, object]:
    from dsv3.config import registry

    return dict(registry.SCHEMAS)


def test_dsv3s_own_files_are_not_the_users(here: Path) -> None:
    files = UserFiles(["model=671b", "parallel=pp", "experiments=learning_rate", "experiments=nope"], None)
    assert [file.name for file in files.used] == ["learning_rate.yaml"]
