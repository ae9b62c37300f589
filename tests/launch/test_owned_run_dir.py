"""Whatever writes into a directory refuses one that another command owns; what only reads it does not."""

import os
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from dsv3.distributed.directory_lock import LOCK_FILE, DirectoryLock
from dsv3.tasks.prepare import PrepareTask
from tests.harness.commands import ConvertCommand, TrainCommand
from tests.harness.outcome import Outcome, succeeded
from tests.harness.tiny import MODEL, TRAINING
from tests.launch import stubs

WRITERS = {
    "resume": ["resume=RUN"],
    "a restart": ["resume=RUN", "launch.max_restarts=1"],
    "workers": ["resume=RUN", "parallel=fsdp", "launch.nproc=2", "train.microbatch_size=1"],
    "Slurm": ["resume=RUN", "launch=slurm"],
    "a new run": ["run.dir=NEW"],
    "a sweep": ["-m", "train.steps=1,2", "run.dir=NEW"],
    "a sweep of plans": ["-m", "task=plan", "train.steps=1,2", "run.dir=NEW"],
    "a job of a sweep": ["-m", "train.steps=1", "run.dir=PARENT"],
    "shards": ["task=prepare", "task.input=TEXT", "task.output=NEW", "tokenizer.vocab_size=300"],
}
READERS = {
    "plan": ["task=plan", "checkpoint.load=RUN"],
    "evaluate": ["task=evaluate", "checkpoint.load=RUN", "train.evaluate_tokens=32"],
    "generate": ["task=generate", "checkpoint.load=RUN", "task.max_tokens=1", "task.prompt=a"],
    "replay": ["task=replay", "task.run=RUN", "task.step=1"],
    "fine-tuning": ["checkpoint.load=RUN", "train.steps=1", "run.dir=OTHER"],
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A place for a run of one step, which the first test that needs it trains."""
    return tmp_path_factory.mktemp("owned") / "run"


@pytest.fixture
def places(commands: TrainCommand, run: Path, tmp_path: Path) -> dict[str, str]:
    """What the words in capitals of a command stand for."""
    if not run.exists():
        commands.train(run, "train.steps=1", "train.evaluate_every=0")
    places = {"RUN": run, "NEW": tmp_path / "new" / "0", "PARENT": tmp_path / "new", "TEXT": commands.text}
    return {**{name: str(path) for name, path in places.items()}, "OTHER": str(tmp_path / "other")}


@pytest.fixture
def owned(request: pytest.FixtureRequest, places: dict[str, str]) -> Iterator[Path]:
    """The directory that a command wants, in the hands of another."""
    directory = Path(places["RUN" if "RUN" in str(request.getfixturevalue("typed")) else "NEW"])
    lock = DirectoryLock(directory, "test")
    lock.take()
    yield directory
    lock.release()


def carried_out(commands: TrainCommand, typed: list[str], places: dict[str, str]) -> Outcome:
    """Carry a command out; one that begins a run gets the tiny model."""
    words = [re.sub("|".join(places), lambda found: places[found[0]], argument) for argument in typed]
    begins = any(each.startswith(("run.dir=", "-m")) for each in typed)
    tiny = [*MODEL, *TRAINING, "data=text", f"data.path={commands.text}"] if begins else []
    if "checkpoint.load=RUN" in typed:
        tiny = [*TRAINING, "data=text", f"data.path={commands.text}"] if begins else []
    return commands.run(*tiny, *words)


def content(directory: Path) -> dict[str, int]:
    """Return the files below a directory with the times of their last change."""
    files = (path for path in directory.rglob("*") if path.is_file())
    return {str(path.relative_to(directory)): path.stat().st_mtime_ns for path in files}


@pytest.mark.parametrize("typed", WRITERS.values(), ids=WRITERS)
def test_a_command_that_writes_is_told_who_owns_the_directory_and_changes_nothing(
    commands: TrainCommand,
    places: dict[str, str],
    typed: list[str],
    owned: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stubs.install(tmp_path / "bin")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    before = content(owned)
    if typed[0].startswith(("resume=", "run.dir=")):  # before anything is imported or prepared for it
        monkeypatch.setattr("dsv3.programs.build", lambda task: 1 / 0)
    outcome = carried_out(commands, typed, places)
    is_job = "PARENT" in str(typed)  # the sweep goes on with its other jobs
    assert outcome.code == (1 if is_job else 2), outcome.err
    told = outcome.err[outcome.err.index("job 0: " if is_job else "error: ") :]
    assert re.search(
        rf"=\S*{re.escape(str(owned))} is (in use|being prepared) by process {os.getpid()} on", told
    )
    assert f"kill {os.getpid()}" in told
    if is_job:
        assert (owned / "failed.json").exists()
    else:
        assert content(owned) == before


@pytest.mark.parametrize("typed", READERS.values(), ids=READERS)
def test_a_command_that_reads_does_not_mind(
    commands: TrainCommand, places: dict[str, str], typed: list[str], owned: Path
) -> None:
    before = content(owned)
    succeeded(carried_out(commands, typed, places))
    assert content(owned) == before


def test_conversions_and_downloads_into_one_output(
    convert: ConvertCommand, places: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, told = (
        tmp_path / "out",
        rf"error: output={tmp_path}/out is being {{}} by process {os.getpid()} on",
    )
    with DirectoryLock(tmp_path / ".out.partial", "test", "being written"):
        outcome = convert("dcp_to_hf", places["RUN"], output)
        assert outcome.code == 2
        assert outcome.err.startswith(told.format("written"))
    listed = "abc", [SimpleNamespace(path="config.json", size=1, blob_id="", lfs=None)]
    monkeypatch.setattr("dsv3.convert.download._list", lambda *_: listed)
    with DirectoryLock(output / ".cache" / "huggingface", "test", "being downloaded into"):
        outcome = convert.run("direction=download", "repo=owner/name", f"output={output}")
        assert outcome.code == 2
        assert outcome.err.startswith(told.format("downloaded into"))
    assert not output.exists()


def test_a_run_gives_its_directory_back_and_a_failed_one_leaves_none(
    commands: TrainCommand, places: dict[str, str]
) -> None:
    run, new = Path(places["RUN"]), Path(places["NEW"])
    assert (run / LOCK_FILE).read_bytes() == b""
    with DirectoryLock(run, "test"):
        pass
    tiny = [*MODEL, *TRAINING, "train.steps=1", f"run.dir={new}"]
    outcome = commands.run(*tiny, "data=text", "data.path=/nowhere")
    assert (outcome.code, new.parent.exists()) == (2, False)


def test_two_commands_prepare_one_output_from_its_first_moment_on(
    commands: TrainCommand, places: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[bool] = []

    def find(self: PrepareTask, *_: object) -> None:
        with pytest.raises(Exception, match="is being prepared by process"):
            DirectoryLock(self.output, f"task.output={self.output}", "being prepared").take()
        seen.append(True)
        raise KeyboardInterrupt

    monkeypatch.setattr(PrepareTask, "_find", find)
    assert carried_out(commands, WRITERS["shards"], places).code == 130
    assert seen
    assert not Path(places["NEW"]).exists()
