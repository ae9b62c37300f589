"""A `_target_` and a stored file may make only classes of dsv3 and torch.optim run."""

import copy
import re
from pathlib import Path

import pytest
import yaml
from omegaconf import OmegaConf

from dsv3.config.convergence import flatten
from dsv3.config.model import ModelConfig
from dsv3.config.strict import check_target, strict, to_yaml
from dsv3.errors import UserError
from tests.harness.commands import PlannedCommand
from tests.harness.composing import compose
from tests.harness.runs import StoredRun

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ("os.system", "run.allow_targets"),
        ("dsv3.programs.os.system", "does not exist"),
        ("dsv3.launch.run_dir.subprocess.Popen", "does not exist"),
        ("dsv3.launch.run_dir.Path", "not a class that"),
        ("dsv3.programs.start_job", "not a class that"),
        ("dsv3.model.transformer.Transfomer", "does not exist"),
        ("dsv3", "refused"),
        ("dsv3x.Model", "refused"),
        ("torch.load", "refused"),
        ("dsv3.model.layers.", "refused"),
        ("", "refused"),
    ],
)
def test_anything_but_a_class_of_a_trusted_module_is_refused(target: str, words: str) -> None:
    with pytest.raises(UserError, match=r"model\._target_=") as caught:
        check_target(target, "model._target_")
    assert words in str(caught.value)


def test_a_class_must_take_the_settings_of_its_node() -> None:
    settings = ["lr", "betas", "eps", "weight_decay", "fused"]
    check_target("torch.optim.Adam", "optimizer._target_", settings=settings)
    with pytest.raises(UserError, match="takes no betas, eps"):
        check_target("torch.optim.SGD", "optimizer._target_", settings=settings)
    with pytest.raises(UserError, match="takes no lr"):
        check_target("torch.optim.lr_scheduler.StepLR", "optimizer._target_", settings=settings)


def test_a_typed_permission_opens_a_module_and_no_other(planned: PlannedCommand) -> None:
    target = "optimizer._target_=collections.OrderedDict"
    assert planned.run("task=plan", target, "run.allow_targets=[collections]").code == 0
    assert planned.run("task=plan", target, "run.allow_targets=[collection]").code == 2
    assert planned.run("task=plan", target).code == 2


@pytest.mark.parametrize("entry", ["5: 1", "at: {5: 1}", "at: {}", "_recursive_: false", "at: [[1]]"])
def test_a_class_of_the_user_s_takes_values_by_name(planned: PlannedCommand, entry: str) -> None:
    """Numbers as names met an error of OmegaConf's, which suggested the same name."""
    node = f"+train.callbacks.own={{_target_: dsv3.training.callbacks.Callback, {entry}}}"
    outcome = planned.run(node)
    assert outcome.code == 2
    assert "train.callbacks.own takes values and lists of values beside _target_" in outcome.err


@pytest.mark.parametrize("node", ["model", "optimizer", "task", "data", "schedule", "logger", "recompute"])
def test_every_node_refuses_a_foreign_target(planned: PlannedCommand, node: str) -> None:
    outcome = planned.run(f"{node}._target_=os.system")
    assert outcome.code == 2
    assert f"{node}._target_=os.system is refused" in outcome.err


@pytest.mark.parametrize(
    "permission",
    [
        "run.allow_targets=[collections]",
        "++run.allow_targets=[collections]",
        "run={allow_targets:[collections]}",
    ],
)
def test_a_stored_permission_does_not_count(
    planned: PlannedCommand, stored: StoredRun, permission: str
) -> None:
    directory = stored.store("optimizer._target_=collections.OrderedDict", permission)
    stored.change(optimizer___target_="collections.OrderedDict")
    outcome = planned.run(f"resume={directory}")
    assert outcome.code == 2
    assert "is refused" in outcome.err
    assert planned.run(f"resume={directory}", "run.allow_targets=[collections]").code == 0


@pytest.mark.parametrize(
    "planted",
    [
        "+hydra.callbacks.x._target_=os.system",
        "++hydra.job.env_set.X=1",
        "hydra/launcher=joblib",
        "+experiments@hydra.callbacks.x=learning_rate",
        "+data@_global_.hydra.callbacks.x=text",
        "--config-dir=evil",
        "--config-path=evil",
        "-m",
        "~logger",
        7,
    ],
)
def test_what_a_run_never_stores_is_refused(planned: PlannedCommand, stored: StoredRun, planted: str) -> None:
    directory = stored.store("train.steps=3", planted)
    outcome = planned.run(f"resume={directory}")
    assert outcome.code == 2
    assert "overrides.yaml" in outcome.err
    assert len(outcome.err.splitlines()) == 1
    assert not outcome.jobs


@pytest.mark.parametrize("target", ["os.system", "dsv3.launch.run_dir.subprocess.Popen", "", 7])
@pytest.mark.parametrize("key", ["optimizer", "parallel", "logger.files.0", "planted.deep.down"])
def test_a_target_planted_in_a_stored_config_is_refused(
    planned: PlannedCommand, stored: StoredRun, key: str, target: object
) -> None:
    file = stored.store() / "config.yaml"
    config = OmegaConf.create(file.read_text())
    config.logger.files = [{"name": "x"}]
    OmegaConf.update(config, f"{key}._target_", target, force_add=True)
    file.write_text(OmegaConf.to_yaml(config))
    outcome = planned.run(f"resume={stored.directory}")
    assert outcome.code == 2
    assert f"{file}: {key}._target_={target} " in outcome.err
    assert len(outcome.err.splitlines()) == 1


def test_a_stored_class_of_ours_may_be_replaced_by_another(
    planned: PlannedCommand, stored: StoredRun
) -> None:
    directory = stored.store("schedule=wsd", "logger=wandb")
    assert planned.run(f"resume={directory}", "schedule=steps", "logger=none").code == 0


@pytest.mark.parametrize("text", ["_target_: os.system", "- 1", "a: &a [*a]", "{", "[" * 5000])
def test_a_checkpoints_model_is_looked_at_before_a_run_goes_on(
    planned: PlannedCommand, stored: StoredRun, text: str
) -> None:
    for number, content in ((3, text), (20, "dim: 128")):
        step = stored.store() / "checkpoints" / f"step-{number}"
        step.mkdir(parents=True)
        (step / ".metadata").touch()
        (step / "model.yaml").write_text(content)
    assert planned.run(f"resume={stored.directory}").code == 0  # step 20 is what it would go on from
    (step / "model.yaml").write_text(text)
    outcome = planned.run(f"resume={stored.directory}")
    assert outcome.code == 2
    assert f"{step}/model.yaml" in outcome.err
    assert len(outcome.err.splitlines()) == 1


def test_a_stored_yaml_tag_runs_nothing(planned: PlannedCommand, stored: StoredRun, tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    directory = stored.store()
    harm = f"!!python/object/apply:os.system ['touch {marker}']\n"
    for name in ("overrides.yaml", "config.yaml"):
        kept = (directory / name).read_text()
        (directory / name).write_text(harm)
        outcome = planned.run(f"resume={directory}")
        assert outcome.code == 2
        assert name in outcome.err
        (directory / name).write_text(kept)
    assert not marker.exists()


@pytest.fixture
def checkpoint(tmp_path: Path, planned: PlannedCommand) -> Path:
    """What checkpoint.load needs of a checkpoint before torch reads it: a model of 96 dimensions."""
    step = tmp_path / "it's a, run" / "checkpoints" / "step-3"
    step.mkdir(parents=True)
    (step / ".metadata").touch()
    model = planned.run("task=plan", "model.dim=96", "model.num_layers=3").job.config.model
    write_model(step, model)
    return step


def write_model(step: Path, model: ModelConfig, **changes: str) -> None:
    (step / "model.yaml").write_text(yaml.safe_dump({**to_yaml(model), **changes}))


def test_a_checkpoint_supplies_the_model(planned: PlannedCommand, checkpoint: Path) -> None:
    for path in (checkpoint, checkpoint.parents[1]):
        config = planned.run("task=plan", f"checkpoint.load={path}").job.config
        assert (config.model.dim, config.model.num_layers) == (96, 3)


def test_typed_numbers_take_the_place_of_the_checkpoints(planned: PlannedCommand, checkpoint: Path) -> None:
    load = f"checkpoint.load={checkpoint}"
    assert "model.dim is 96 there, 128 here" in planned.run("task=plan", load, "model=debug").err
    config = planned.run("task=plan", load, "model.moe.top_k=1", "model.rope.theta=500").job.config
    assert (config.model.moe.top_k, config.model.rope.theta, config.model.dim) == (1, 500.0, 96)
    wrong = planned.run("task=plan", load, "model.moe.top_k=99")
    assert wrong.code == 2
    assert "model.moe.top_k=99" in wrong.err


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("_target_: os.system", "_target_=os.system is refused"),
        ("dim: '${oc.env:HOME}'", "could not be converted to Integer"),
        ("foo: 1", "model.yaml is not a model"),
        ("!!python/object/apply:os.system ['touch ran']", "has the tag"),
        ("[1", "is not YAML"),
    ],
)
def test_a_planted_model_runs_nothing(
    planned: PlannedCommand, checkpoint: Path, text: str, words: str
) -> None:
    with (checkpoint / "model.yaml").open("a" if ":" in text and "!!" not in text else "w") as file:
        file.write(text + "\n")
    outcome = planned.run("task=plan", f"checkpoint.load={checkpoint}")
    assert outcome.code == 2
    assert words in outcome.err
    assert len(outcome.err.splitlines()) == 1
    assert not list(Path.cwd().iterdir())


def test_every_whole_number_fits_in_64_bits() -> None:
    composed = compose(["task=plan"])
    keys = [key for key, value in flatten(to_yaml(strict(composed))).items() if type(value) is int]
    assert len(keys) > 20
    for key in keys:
        for value in (2**63, -(10**20)):
            changed = copy.deepcopy(composed)
            OmegaConf.update(changed, key, value)
            with pytest.raises(UserError, match=re.escape(f"{key}={value} is not possible: must be")):
                strict(changed)
