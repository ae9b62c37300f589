"""What is typed, or an experiment's, acts over the values that a checkpoint carries, default or not."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from dsv3.checkpoint.directory import complete_steps
from dsv3.config.convert import ConvertConfig
from dsv3.config.overrides import absolute_paths, typed_text
from dsv3.convert.request import prepare_conversion
from dsv3.hf.config_writer import config_json
from dsv3.programs import CONVERT
from tests.convert.releases import small_model, write_release
from tests.harness.commands import ConvertCommand, PlannedCommand, TrainCommand, run_here
from tests.harness.outcome import refused

pytestmark = pytest.mark.slow

DEFAULTS = [
    "model.mtp_depths=0",
    "model.norm_eps=1e-6",
    "model.moe.top_k=1",
    "model.moe.num_groups=1",
    "model.moe.top_k_groups=1",
    "model.rope.theta=10000",
    "model.moe.route_scale=1",
]
"""Values that equal the schema's defaults, or that no default is known for."""

OWN: dict[str, Any] = {"mtp_depths": 1, "norm_eps": 3e-6}
OWN_MOE: dict[str, Any] = {"top_k": 2, "num_groups": 2, "top_k_groups": 2, "route_scale": 2.5}


def own_overrides() -> list[str]:
    moe = [f"model.moe.{key}={value}" for key, value in OWN_MOE.items()]
    return [*(f"model.{key}={value}" for key, value in OWN.items()), *moe, "model.rope.theta=5000"]


def assert_default(model: Any) -> None:
    assert (model.mtp_depths, model.norm_eps, model.rope.theta) == (0, 1e-6, 10000)
    moe = model.moe
    assert (moe.top_k, moe.num_groups, moe.top_k_groups, moe.route_scale) == (1, 1, 1, 1)
    assert model.dim == 64  # the rest is the checkpoint's


def assert_own(model: Any) -> None:
    moe = model.moe
    assert (model.mtp_depths, model.norm_eps, model.rope.theta, moe.top_k) == (1, 3e-6, 5000, 2)
    assert (moe.num_groups, moe.route_scale, model.dim) == (2, 2.5, 64)


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A HuggingFace checkpoint whose numbers are no defaults."""
    folder = tmp_path_factory.mktemp("released") / "a b"
    write_release(folder, small_model(*own_overrides()), "bf16")
    return folder


@pytest.fixture(scope="module")
def described(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A DCP directory that only describes itself."""
    from dsv3.config.strict import to_yaml

    folder = tmp_path_factory.mktemp("dcp")
    (folder / ".metadata").write_bytes(b"")
    (folder / "model.yaml").write_text(yaml.safe_dump(to_yaml(small_model(*own_overrides()))))
    return folder


@pytest.mark.parametrize("place", ["model=hf model.path={release}", "checkpoint.load=hf:{release}"])
def test_typed_values_act_over_a_released_model(planned: PlannedCommand, release: Path, place: str) -> None:
    where = (
        [each.format(release=release) for each in place.split(" ", 1)]
        if "=hf " in place
        else [place.format(release=release)]
    )
    assert_own(planned.run("task=plan", *where).job.config.model)
    assert_default(planned.run("task=plan", *where, *DEFAULTS).job.config.model)


def test_typed_values_act_over_a_dcp(planned: PlannedCommand, described: Path) -> None:
    load = f"checkpoint.load={described}"
    assert_own(planned.run("task=plan", load).job.config.model)
    assert_default(planned.run("task=plan", load, *DEFAULTS).job.config.model)


@pytest.mark.parametrize("typed", ["${model.dim}/x", "${foo}", r"'\${oc.env:HOME}/x'", "a\\${b}"])
def test_a_text_with_an_interpolation_is_the_same_after_the_second_composition(
    planned: PlannedCommand, described: Path, typed: str
) -> None:
    load = [f"checkpoint.load={described}", "tokenizer=trained"]
    job = planned.run("task=train", *load, "logger=none", f"run.dir={typed}").job
    text = typed.replace(r"\$", "$").strip("'") if typed.startswith("'") else typed
    assert job.config.run.dir == text
    assert [str(Path(text).absolute())] == [
        typed_text(each) for each in absolute_paths(job.overrides) if each.startswith("run.dir=")
    ]


def experiment(folder: Path, text: str) -> list[str]:
    (folder / "experiments").mkdir(exist_ok=True)
    (folder / "experiments" / "mine.yaml").write_text(text)
    return [f"--config-dir={folder}", "experiments=mine", "task=plan"]


@pytest.mark.parametrize("place", ["hf", "load"])
def test_an_experiments_values_act_over_the_checkpoint_and_typed_ones_over_both(
    planned: PlannedCommand, release: Path, described: Path, tmp_path: Path, place: str
) -> None:
    """Over a checkpoint that is loaded, an experiment's own numbers have to be typed (..._compared.py)."""
    where = ["model=hf", f"model.path={release}"] if place == "hf" else [f"checkpoint.load={described}"]
    silent = experiment(tmp_path, "# @package _global_\ntrain: {steps: 7}\n")
    job = planned.run(*silent, *where).job
    assert_own(job.config.model)  # an experiment that sets no model does not displace the checkpoint's
    assert job.config.train.steps == 7
    sets = experiment(
        tmp_path,
        "# @package _global_\nmodel: {mtp_depths: 0, moe: {top_k: 1, num_groups: 1, top_k_groups: 1}}\n",
    )
    keys = ["mtp_depths=0", "moe.top_k=1", "moe.num_groups=1", "moe.top_k_groups=1"]
    typed = [f"model.{key}" for key in keys] if place == "load" else []
    model = planned.run(*sets, *where, *typed).job.config.model
    assert (model.mtp_depths, model.moe.top_k, model.moe.num_groups, model.norm_eps) == (0, 1, 1, 3e-6)
    model = planned.run(*sets, *where, *typed, "model.moe.top_k=2").job.config.model
    assert (model.mtp_depths, model.moe.top_k) == (0, 2)


def test_an_experiment_that_chooses_another_model_than_the_checkpoints_is_refused(
    planned: PlannedCommand, described: Path, tmp_path: Path
) -> None:
    chooses = experiment(tmp_path, "# @package _global_\ndefaults: [{override /model: debug}]\n")
    assert planned.run(*chooses).job.config.model == planned.run("task=plan", "model=debug").job.config.model
    refused(planned.run(*chooses, f"checkpoint.load={described}"), "model.vocab_size is 96 there, 4096 here")


def test_jobs_of_a_sweep_do_not_see_the_model_of_another(planned: PlannedCommand, tmp_path: Path) -> None:
    for name, layers in (("one", 2), ("two", 4)):
        (tmp_path / name).mkdir()
        described = config_json(small_model(f"model.num_layers={layers}"), "bfloat16")
        (tmp_path / name / "config.json").write_text(json.dumps(described))
    paths = f"model.path={tmp_path / 'one'},{tmp_path / 'two'}"
    swept = planned.run("-m", "task=plan", "model=hf", paths, "model.mtp_depths=0,1")
    found = [(job.config.model.num_layers, job.config.model.mtp_depths) for job in swept.jobs]
    assert found == [(2, 0), (2, 1), (4, 0), (4, 1)]
    assert planned.run("task=plan", "model=debug").job.config.model.num_layers == 4


def test_a_run_of_a_released_model_resumes_when_the_release_is_gone(
    commands: TrainCommand, planned: PlannedCommand, release: Path, tmp_path: Path
) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    (gone / "config.json").write_bytes((release / "config.json").read_bytes())
    run = tmp_path / "run"
    small = ["tokenizer.vocab_size=280", "model.vocab_size=300", "model.mtp_depths=0", "train.steps=2"]
    data = ["data=text", f"data.path={commands.text}", "train.sequence_length=16", "logger=none"]
    quick = ["train.global_batch_size=2", "train.stop_after=1", "train.evaluate_tokens=64"]
    commands.must("model=hf", f"model.path={gone}", *small, *data, *quick, f"run.dir={run}")
    (gone / "config.json").unlink()
    model = planned.run(f"resume={run}").job.config.model
    assert (model.mtp_depths, model.dim, model.vocab_size) == (0, 64, 300)
    assert_own_but_mtp = planned.run("task=plan", f"checkpoint.load={run}").job.config.model
    assert (assert_own_but_mtp.moe.top_k, assert_own_but_mtp.mtp_depths) == (2, 0)


def prepared(*typed: str) -> ConvertConfig:
    """Return the checked config of a conversion as it is typed."""
    found: list[ConvertConfig] = []
    assert run_here(CONVERT, list(typed), lambda composed: found.append(prepare_conversion(composed))) == 0
    return found[0]


@pytest.mark.parametrize("direction", ["hf_to_dcp", "hf_to_hf", "dcp_to_hf"])
def test_typed_values_act_over_the_input_of_a_conversion(
    here: Path, release: Path, described: Path, direction: str, tmp_path: Path
) -> None:
    source = described if direction == "dcp_to_hf" else release
    command = [f"direction={direction}", f"input={source}", "output=out"]
    assert_own(prepared(*command).model)
    assert_default(prepared(*command, *DEFAULTS).model)
    other = tmp_path / "other"
    other.mkdir()
    same = small_model(*own_overrides(), "model.num_layers=2")
    (other / "config.json").write_text(json.dumps(config_json(same, "bfloat16")))
    model = prepared(*command, f"model.path={other}", "model.num_layers=2", "model.mtp_depths=0").model
    assert model is not None
    assert (model.num_layers, model.mtp_depths) == (2, 0)


def test_a_conversion_writes_the_numbers_that_were_typed(
    convert: ConvertCommand, release: Path, tmp_path: Path
) -> None:
    convert.whole = True
    typed = ["model.moe.top_k=1", "model.rope.theta=10000"]
    dcp, back = tmp_path / "dcp", tmp_path / "back"
    convert.must("hf_to_dcp", release, dcp, *typed)
    stored = yaml.safe_load((dcp / "model.yaml").read_text())
    assert (stored["moe"]["top_k"], stored["rope"]["theta"], stored["moe"]["num_groups"]) == (1, 10000, 2)
    convert.must("dcp_to_hf", dcp, back, "model.moe.route_scale=1")
    written = json.loads((back / "config.json").read_text())
    assert (written["num_experts_per_tok"], written["rope_theta"], written["routed_scaling_factor"]) == (
        1,
        10000,
        1,
    )
    assert written["n_group"] == 2


def test_steps_of_a_run_carry_the_typed_model(commands: TrainCommand, tmp_path: Path) -> None:
    run = tmp_path / "run"
    commands.train(run, "train.steps=1", "model.moe.top_k=1", "model.mtp_depths=0")
    stored = yaml.safe_load((complete_steps(run)[-1] / "model.yaml").read_text())
    assert (stored["moe"]["top_k"], stored["mtp_depths"]) == (1, 0)
