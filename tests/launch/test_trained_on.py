"""What a command takes from the checkpoint it reads, and what is typed or an experiment's over it."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from dsv3.checkpoint.training_record import TrainingRecord
from dsv3.config.data import LocalTokenizerConfig, StdlibDataConfig, TextDataConfig, TrainedTokenizerConfig
from dsv3.config.root import Config
from dsv3.config.strict import strict, to_yaml
from dsv3.config.task import EvaluateTaskConfig
from dsv3.errors import UserError
from dsv3.launch.checkpoint_defaults import Composition
from dsv3.launch.job import plan_job
from dsv3.launch.trained_on import carried_values, rebuild, training_record
from tests.harness.commands import PlannedCommand
from tests.harness.composing import strict_config
from tests.harness.outcome import refused
from tests.harness.tiny import MODEL, TRAINING
from tests.hf.test_config_json import RELEASED_V3


@pytest.fixture(scope="module")
def _stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stored")
    text, step = folder / "text, ${of} mine", folder / "step"
    text.mkdir()
    (step / "tokenizer").mkdir(parents=True)
    (step / "tokenizer" / "tokenizer.json").write_text("{}")
    (step / ".metadata").write_bytes(b"")
    settings = ["data.document_mask=true", "data.held_out=0.2", "data=text", "train.sequence_length=48"]
    typed = {setting.partition("=")[0]: setting for setting in [*MODEL, *TRAINING, *settings]}
    config = plan_job(strict_config([*typed.values(), "data.path=x"]), []).config
    config.data.path = str(text)  # type: ignore[attr-defined]
    (step / "model.yaml").write_text(yaml.safe_dump(to_yaml(config.model)))
    TrainingRecord.of_run(config, "d" * 16, "t" * 16).write(step, 3)
    return step


@pytest.fixture
def step(_stored: Path, tmp_path: Path) -> Path:
    """What a command reads of a step before torch: metadata by name, the model, the record, a tokenizer."""
    return Path(shutil.copytree(_stored, tmp_path / "step"))


@pytest.fixture
def text(_stored: Path) -> str:
    """The folder of texts of the step's run."""
    return str(_stored.with_name("text, ${of} mine"))


def planned_config(planned: PlannedCommand, step: Path, *arguments: str, task: str = "evaluate") -> Config:
    """Return the config of a task over a checkpoint."""
    return planned.run(f"task={task}", f"checkpoint.load={step}", *arguments).job.config


def data_of(config: Config) -> tuple[Any, ...]:
    """Return what decides on the held-out rows, the tokenizer last."""
    data, tokenizer = config.data, config.tokenizer
    source = (type(data).__name__, getattr(data, "path", None))
    return (*source, data.held_out, data.document_mask, config.train.sequence_length, tokenizer)


TOKENIZER = TrainedTokenizerConfig(vocab_size=300)


def test_data_tokenizer_and_length_are_those_of_the_checkpoint(
    planned: PlannedCommand, step: Path, text: str
) -> None:
    job = planned.run("task=evaluate", f"checkpoint.load={step}").job
    assert data_of(job.config) == ("TextDataConfig", text, 0.2, True, 48, TOKENIZER)
    assert (job.own_data, job.notes) == (True, [])
    generating = planned_config(planned, step, task="generate")
    assert (generating.train.sequence_length, generating.tokenizer) == (48, TOKENIZER)
    training = planned_config(planned, step, "run.dir=run", "train.steps=200", task="train")
    assert data_of(training) == ("StdlibDataConfig", None, 0.03, False, 256, TOKENIZER)


@pytest.mark.parametrize(
    ("typed", "changed"),
    [
        ("data.held_out=0.03 data.document_mask=false", {2: 0.03, 3: False}),
        ("data.path=/other", {1: "/other"}),
        ("data=text data.path=/other", {1: "/other", 2: 0.03, 3: False}),
        ("data=stdlib", {0: "StdlibDataConfig", 1: None, 2: 0.03, 3: False}),
        ("train.sequence_length=256", {4: 256}),
        ("train.sequence_length=null", {4: None}),
        ("tokenizer=local tokenizer.path=/other", {5: LocalTokenizerConfig(path="/other")}),
        ("tokenizer.vocab_size=4096", {5: TrainedTokenizerConfig(vocab_size=4096)}),
    ],
)
def test_what_is_typed_acts_over_it(step: Path, text: str, typed: str, changed: dict[int, Any]) -> None:
    stored = carried_values(step, training_record(step), EvaluateTaskConfig, ())
    found = data_of(strict(Composition(["task=evaluate", *typed.split()]).over(stored)))
    carried = ["TextDataConfig", text, 0.2, True, 48, TOKENIZER]
    assert found == tuple(changed.get(place, value) for place, value in enumerate(carried))


def test_a_key_that_only_its_data_has_acts_typed_and_by_an_experiment(
    planned: PlannedCommand, step: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    other.mkdir()
    for arguments in (
        [f"data.path={other}"],
        experiment(tmp_path, [f"data.path={other}", "data.held_out=0.1"]),
    ):
        job = planned.run("task=evaluate", f"checkpoint.load={step}", *arguments).job
        share = 0.2 if len(arguments) == 1 else 0.1
        assert data_of(job.config) == ("TextDataConfig", str(other), share, True, 48, TOKENIZER)
        assert job.own_data


def experiment(folder: Path, typed: list[str]) -> list[str]:
    """Write the arguments as an experiment of a folder of the user's; return what chooses it."""
    pairs = [value.partition("=")[::2] for value in typed]
    chosen = [{f"override /{key}": value} for key, value in pairs if "." not in key]
    content: dict[str, Any] = {"defaults": [*chosen, "_self_"]}
    for key, value in pairs:
        group, dot, name = key.partition(".")
        if dot:
            content.setdefault(group, {})[name] = yaml.safe_load(value)
    (folder / "conf" / "experiments").mkdir(parents=True)
    text = "# @package _global_\n" + yaml.safe_dump(content)
    (folder / "conf" / "experiments" / "mine.yaml").write_text(text)
    return [f"--config-dir={folder / 'conf'}", "experiments=mine"]


def test_a_run_of_older_code_is_described_by_its_own_files(tmp_path: Path) -> None:
    step = tmp_path / "run" / "checkpoints" / "step-2"
    step.mkdir(parents=True)
    (step / ".metadata").touch()
    assert training_record(step) is None
    stored = {"data": {"_target_": "dsv3.data.table.TokensData"}, "parallel": {"smallest_world": 2}}
    (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump(stored))
    (tmp_path / "run" / "environment.json").write_text(json.dumps({"data": {"fingerprint": "abc"}}))
    record = training_record(step)
    assert record is not None
    assert (record.step, record.data_fingerprint, record.tokenizer_fingerprint) == (2, "abc", None)
    assert record.config["data"]["_target_"] == "dsv3.data.token_table.TokensData"
    (tmp_path / "run" / "environment.json").write_text("{")
    assert training_record(step).data_fingerprint is None  # type: ignore[union-attr]
    (tmp_path / "run" / "config.yaml").write_text("- 1")
    with pytest.raises(UserError, match=r"config\.yaml cannot be read"):
        training_record(step)


def test_a_stored_node_becomes_the_schema_of_its_class_and_keys() -> None:
    for schema in (TextDataConfig(path="/a${b}"), StdlibDataConfig(held_out=0.1), TOKENIZER):
        group = "tokenizer" if schema is TOKENIZER else "data"
        assert rebuild(group, to_yaml(schema), "somewhere") == schema


@pytest.mark.parametrize(
    ("stored", "words"),
    [
        ({"_target_": "os.system"}, "data._target_=os.system is refused: only classes of dsv3, torch.optim"),
        ({"_target_": "dsv3.errors.UserError"}, "is refused: no choice of data builds it"),
        ({"_target_": "dsv3.data.sources.TextData", "paths": []}, "no choice of data here has the keys"),
        ({"_target_": "dsv3.data.sources.TextData", "held_out": "much"}, "is not possible"),
        (None, "data._target_=None is refused"),
    ],
)
def test_a_stored_node_that_is_no_choice_of_its_group_is_refused(stored: Any, words: str) -> None:
    with pytest.raises(UserError, match=words):
        rebuild("data", stored, "somewhere")


def test_a_key_of_another_tokenizer_than_that_of_the_checkpoint_is_refused_with_the_way_to_choose_it(
    planned: PlannedCommand, step: Path
) -> None:
    (step / "training.yaml").unlink()  # what is left is a tokenizer on disk
    outcome = planned.run("task=evaluate", f"checkpoint.load={step}", "tokenizer.vocab_size=300")
    refused(outcome, "tokenizer.vocab_size")
    chosen = ["tokenizer=trained", "tokenizer.vocab_size=300"]
    assert planned_config(planned, step, *chosen).tokenizer == TOKENIZER


PLANS = ["hardware=h100", "hardware.memory_bytes=100000000000000"]


@pytest.fixture
def release(tmp_path: Path) -> Path:
    """A released model as far as a plan looks at it, without a tokenizer."""
    (tmp_path / "release").mkdir()
    (tmp_path / "release" / "config.json").write_text(json.dumps(RELEASED_V3))
    return tmp_path / "release"


@pytest.mark.parametrize("task", ["train", "evaluate"])
def test_weights_without_a_tokenizer_are_not_given_a_new_one_in_silence(
    planned: PlannedCommand, release: Path, tmp_path: Path, task: str
) -> None:
    command = [f"task={task}", f"checkpoint.load=hf:{release}", *PLANS]
    told = ["carries no tokenizer", "tokenizer=local tokenizer.path=PATH", "tokenizer=trained"]
    refused(planned.run(*command), f"checkpoint.load=hf:{release}", *told)
    assert planned.run(*command, "tokenizer=trained").job.config.tokenizer == TrainedTokenizerConfig()
    (tmp_path / "tokenizer.json").write_text("{}")
    given = planned.run(*command, "tokenizer=local", f"tokenizer.path={tmp_path}").job.config.tokenizer
    assert given == LocalTokenizerConfig(path=str(tmp_path))
    np.save(tmp_path / "ids.npy", np.zeros((9, 33), np.int32))
    assert planned.run(*command, "data=tokens", f"data.path={tmp_path / 'ids.npy'}").code == 0


@pytest.mark.parametrize("name", ["tokenizer.json", "tiktoken.model"])
@pytest.mark.parametrize("place", ["", "hf"])
def test_the_tokenizer_of_a_checkpoint_is_taken_where_its_kind_is_read(
    planned: PlannedCommand, release: Path, step: Path, name: str, place: str
) -> None:
    for path in ("tokenizer", "training.yaml"):
        target = step / path
        shutil.rmtree(target) if target.is_dir() else target.unlink()
    (step / "hf").mkdir()
    folder = step / "hf" if place else release
    (folder / name).write_text("{}")
    load = step if place else f"hf:{release}"
    config = planned.run("task=evaluate", f"checkpoint.load={load}", *PLANS).job.config
    assert config.tokenizer == LocalTokenizerConfig(path=str(folder))


@pytest.mark.parametrize(
    ("task", "name"),
    [("train", "tokenizer.model"), ("evaluate", "tokenization_x.py"), ("generate", "tokenizer_config.json")],
)
def test_a_tokenizer_of_a_kind_that_is_not_read_is_refused_before_anything_starts(
    planned: PlannedCommand, release: Path, task: str, name: str
) -> None:
    (release / name).write_text("x")
    told = planned.run(f"task={task}", f"checkpoint.load=hf:{release}", *PLANS)
    refused(told, f"checkpoint.load=hf:{release}: {release / name}", "is no tokenizer that dsv3 reads")


@pytest.mark.parametrize(
    ("typed", "told"),
    [
        ("checkpoint.load=hf:owner/name", "repo=owner/name assets=all"),
        ("checkpoint.load=owner/name", "repo=owner/name assets=all"),
        ("model=hf model.path=owner/name", "repo=owner/name assets=all"),
        ("model=hf model.path=hf:/a/b", "hf: stands in checkpoint.load alone"),
        ("tokenizer=local tokenizer.path=owner/name", "repo=owner/name assets=all"),
        ("tokenizer=local tokenizer.path=/", "tokenizer.path=/: / holds no tokenizer"),
    ],
)
def test_a_repository_that_is_named_like_a_path_is_told_how_to_fetch(
    planned: PlannedCommand, typed: str, told: str
) -> None:
    refused(planned.run(*typed.split()), told)
