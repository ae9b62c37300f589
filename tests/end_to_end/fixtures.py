"""The fixture that both kinds of real-process tests use; conftest.py of each folder imports it."""

import random
from pathlib import Path

import pytest

from tests.end_to_end.processes import CommandLine


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A folder of 60 short texts and a data cache."""
    text, cache = tmp_path_factory.mktemp("text"), tmp_path_factory.mktemp("cache")
    choose = random.Random(0)
    words = [f"w{number}" for number in range(60)]
    for number in range(60):
        (text / f"{number:02}.txt").write_text(" ".join(choose.choices(words, k=150)) + "\n")
    return text, cache


@pytest.fixture
def command_line(tmp_path: Path, prepared: tuple[Path, Path]) -> CommandLine:
    """train.py as a process, started in an empty directory."""
    text, cache = prepared
    (tmp_path / "here").mkdir()
    return CommandLine(tmp_path / "here", cache, text)
