"""Checkpoints that somebody else made, given to the commands themselves."""

import shutil
from pathlib import Path

import pytest
import yaml

from dsv3.checkpoint.directory import complete_steps
from tests.checkpoint import hostile
from tests.harness.checkpoints import seal
from tests.harness.commands import TrainCommand
from tests.harness.outcome import refused
from tests.harness.processes import run_program

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def _finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("finished") / "run"


@pytest.fixture
def run(commands: TrainCommand, _finished: Path, tmp_path: Path) -> Path:
    """Train a run of one step, which a test may damage."""
    if not _finished.exists():
        commands.train(_finished, "train.steps=2", "train.stop_after=1", "train.evaluate_every=0")
    return Path(shutil.copytree(_finished, tmp_path / "run"))


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    return tmp_path / "executed"


def _poison(run: Path, marker: Path) -> Path:
    (step,) = complete_steps(run)
    malicious, _ = hostile.attacks(f"touch {marker}")["os.system"]
    (step / ".metadata").write_bytes(malicious)
    seal(step)
    return step


def test_evaluating_a_malicious_checkpoint_runs_nothing_and_exits_with_2(
    commands: TrainCommand, run: Path, marker: Path
) -> None:
    """Run the real command in a process of its own."""
    step = _poison(run, marker)
    data = ["data=text", f"data.path={commands.text}"]
    done = run_program("train.py", "task=evaluate", f"checkpoint.load={step}", *data)
    refused(done, str(step))
    assert "it names os.system" in done.err
    assert not marker.exists()


@pytest.mark.parametrize("command", ["resume", "evaluate", "generate", "train"])
def test_a_malicious_checkpoint_is_refused_by_every_command_that_reads_one(
    commands: TrainCommand, run: Path, marker: Path, command: str
) -> None:
    step = _poison(run, marker)
    data = ["data=text", f"data.path={commands.text}"]
    training = ["logger=none", "tokenizer.vocab_size=300", "train.sequence_length=32", *data]
    arguments = {
        "resume": [f"resume={run}"],
        "evaluate": ["task=evaluate", f"checkpoint.load={run}", *data],
        "generate": ["task=generate", f"checkpoint.load={run}", "task.prompt=w1"],
        "train": [f"checkpoint.load={run}", f"run.dir={run.parent / 'next'}", *training],
    }
    refused(commands.run(*arguments[command]), str(step))
    assert not marker.exists()


@pytest.mark.parametrize("sealed", [False, True], ids=["after its manifest", "before its manifest"])
@pytest.mark.parametrize(
    ("name", "content"),
    [
        pytest.param("model.yaml", b"{", id="model.yaml torn"),
        pytest.param("model.yaml", b"- 1", id="model.yaml a list"),
        pytest.param("model.yaml", b"", id="model.yaml empty"),
        pytest.param("model.yaml", b"dim: wide", id="model.yaml text for a number"),
        pytest.param("model.yaml", b"\xff\x00", id="model.yaml no text"),
        pytest.param("model.yaml", None, id="model.yaml missing"),
        pytest.param("__0_0.distcp", None, id="tensors missing"),
        pytest.param("__0_0.distcp", b"PK", id="tensors torn"),
        pytest.param(".metadata", b"\x80", id="metadata torn"),
    ],
)
def test_evaluating_a_damaged_checkpoint_names_the_path(
    commands: TrainCommand, run: Path, name: str, content: bytes | None, sealed: bool
) -> None:
    (step,) = complete_steps(run)
    (step / name).unlink()
    if content is not None:
        (step / name).write_bytes(content)
    if sealed:
        seal(step)
    data = ["data=text", f"data.path={commands.text}"]
    refused(commands.run("task=evaluate", f"checkpoint.load={step}", *data), str(step))


@pytest.mark.parametrize("target", ["os.system", "subprocess.Popen", "dsv3.errors.difflib"])
def test_a_model_file_cannot_choose_what_is_built(commands: TrainCommand, run: Path, target: str) -> None:
    (step,) = complete_steps(run)
    stored = yaml.safe_load((step / "model.yaml").read_text())
    (step / "model.yaml").write_text(yaml.safe_dump(stored | {"_target_": target}))
    seal(step)
    data = ["data=text", f"data.path={commands.text}"]
    outcome = commands.run("task=evaluate", f"checkpoint.load={step}", *data)
    assert outcome.code == 2
    assert f"_target_={target} is refused" in outcome.err


@pytest.mark.parametrize("content", [b"", b"{", b'{"step": "x"}', None])
def test_resuming_without_a_sound_state_names_it(
    commands: TrainCommand, run: Path, content: bytes | None
) -> None:
    (step,) = complete_steps(run)
    (step / "state.json").unlink()
    if content is not None:
        (step / "state.json").write_bytes(content)
    seal(step)
    refused(commands.run(f"resume={run}"), str(step / "state.json"))
