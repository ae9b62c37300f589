"""Arguments that name a pipe, a device, a loop of links or nothing that can exist: a message, and no wait."""

from pathlib import Path

import pytest

from tests.harness.commands import PlannedCommand
from tests.harness.outcome import refused
from tests.untrusted.special_files import make, no_hang

pytestmark = pytest.mark.slow

ARGUMENTS = [
    "resume={}",
    "checkpoint.load={}",
    "task=evaluate checkpoint.load=hf:{}",
    "model=hf model.path={}",
    "tokenizer=local tokenizer.path={}",
    "data=text data.path={}",
    "data=tokens data.path={}",
    "data=shards data.path={}",
    "task=compare task.runs={}",
    "task=prepare task.input=[{}] task.output=prepared",
    "task=verify task.path={}",
    "task=replay task.run={} task.step=1",
    "run.dir={}",
    "--config-dir={}",
]


@pytest.mark.parametrize("argument", ARGUMENTS)
def test_an_argument_may_name_anything(
    argument: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A command that goes as far as its start would meet it there: readers of data have own tests."""
    monkeypatch.chdir(tmp_path)
    for path in (str(make(tmp_path / "pipe", "pipe")), "/" + "a" * 300):
        with no_hang():
            outcome = PlannedCommand(capsys).run(*argument.format(path).split(" "))
        if outcome.code != 0:
            refused(outcome)
            assert len(outcome.err) < 900
