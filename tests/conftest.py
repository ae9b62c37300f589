"""Fixtures that several folders share, around the classes of tests/harness/.

Each imports what it needs when a test asks for it, so that a test without torch waits for none.
"""

from __future__ import annotations

import gc
import os
import signal
import sys
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from dsv3.distributed.garbage import collect_rarely
from dsv3.distributed.signals import STOP_SIGNALS
from dsv3.planning import calibrated

if TYPE_CHECKING:
    from dsv3.tokens.tokenizer import Tokenizer
    from tests.harness.commands import ConvertCommand, PlannedCommand, TrainCommand
    from tests.harness.pool import Pool
    from tests.harness.processes import CommandLine
    from tests.harness.runs import StoredRun

SLOW_FIXTURES = {"pool", "command_line", "simulated"}

# Lines about phases come by the clock: a test that looks at them asks for them.
os.environ["DSV3_PROGRESS"] = "off"

# What was measured on this machine is no part of a test's plan.
calibrated.FOLDER = Path(os.devnull)

collect_rarely()

# Tests send signals to themselves, and what starts them may ignore some, as nohup and a shell's & do.
for _number in STOP_SIGNALS:
    if signal.getsignal(_number) is signal.SIG_IGN:
        signal.signal(_number, signal.default_int_handler if _number == signal.SIGINT else signal.SIG_DFL)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_collection_modifyitems(
    config: pytest.Config, items: list[pytest.Item]
) -> Generator[None, object, object]:
    """Run all that uses the pool in one process, which has one pool; mark what starts processes as slow."""
    pooled = [item for item in items if "pool" in getattr(item, "fixturenames", ())]
    for item in pooled:
        item.add_marker(pytest.mark.xdist_group("pool"))
    for item in items:
        if SLOW_FIXTURES & set(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.slow)
    result = yield
    # pytest 9.2 no longer lets xdist 3.8 name the group, and then there are two pools on two cores.
    kept = [item for item in pooled if item in items]
    if getattr(config.option, "loadgroup", False) and not all(item.nodeid.endswith("@pool") for item in kept):
        raise pytest.UsageError("pytest-xdist does not group tests with this pytest: see constraints.txt")
    return result


def pytest_collection_finish() -> None:
    """Let no collection look at what stays: torch, transformers, the tests. It took a sixth of their time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Compute with one thread, and with as many as before once the test is done.

    On numbers this small a second thread costs more than it brings, it would wait for the other at every
    operation, and a processor's treatment of subnormals is set per thread.
    """
    torch = sys.modules.get("torch")
    if torch is None:
        yield
        return
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def pool() -> Iterator[Pool]:
    """Eight workers in one gloo group."""
    from tests.harness.pool import Pool

    workers = Pool(8)
    yield workers
    workers.close()


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 200 texts, most of them shorter than two rows: many a row holds several."""
    from tests.harness.runs import write_texts

    return write_texts(tmp_path_factory.mktemp("text"), files=200, words=12)


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data cache of the session's."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty directory that is the current one, in a process that nothing has launched."""
    from tests.harness.processes import LAUNCHED

    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr("sys.argv", ["train.py"])
    for variable in LAUNCHED:
        monkeypatch.delenv(variable, raising=False)
    return tmp_path / "here"


@pytest.fixture
def commands(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], text: Path, cache: Path
) -> TrainCommand:
    """train.py in this process, started in an empty directory."""
    from dsv3.config.task import SamplingConfig
    from tests.harness.commands import TrainCommand

    monkeypatch.setenv("DSV3_CACHE", str(cache))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(os.cpu_count()))  # a share of one thread: see _one_thread
    # Neither the picture nor the sample at the end of a run is looked at here.
    monkeypatch.setattr("dsv3.tasks.train.plot_loss_curve", lambda *_: None)
    monkeypatch.setattr("dsv3.tasks.train.SAMPLING", SamplingConfig(max_tokens=1))
    return TrainCommand(capsys, text)


@pytest.fixture
def planned(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> PlannedCommand:
    """train.py up to the start of its workers, in this process and from an empty directory."""
    from tests.harness.commands import PlannedCommand

    monkeypatch.setenv("PYTHONPATH", "")  # a sweep sets it
    return PlannedCommand(capsys)


@pytest.fixture
def convert(here: Path, capsys: pytest.CaptureFixture[str]) -> ConvertCommand:
    """convert.py in this process, started in an empty directory."""
    from tests.harness.commands import ConvertCommand

    return ConvertCommand(capsys)


@pytest.fixture
def command_line(here: Path, cache: Path, text: Path) -> Iterator[CommandLine]:
    """train.py as a process, started in an empty directory; what a test that fails has left is ended."""
    from tests.harness.processes import CommandLine

    command_line = CommandLine(here, cache, text)
    yield command_line
    for process in command_line.started:
        process.end()


@pytest.fixture
def stored(tmp_path: Path) -> StoredRun:
    """A run directory with an awkward name that `resume=` finds."""
    from tests.harness.runs import StoredRun

    return StoredRun(tmp_path / "a run, it's = $HOME (1) [x]")


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    """Return a small trained tokenizer."""
    from dsv3.tokens.tokenizer import TrainedTokenizer
    from tests.data.texts import sentence

    return TrainedTokenizer(300).prepare(sentence(number) for number in range(50))
