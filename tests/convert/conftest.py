from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from dsv3.convert import dcp_target
from tests.convert.command import Convert
from tests.convert.releases import small_model, write_release


@pytest.fixture
def convert(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> Iterator[Convert]:
    """convert.py in this process, started in an empty directory."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    threads = torch.get_num_threads()
    yield Convert(monkeypatch, capsys)
    torch.set_num_threads(threads)


@pytest.fixture
def many_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a small DCP be of many files, as that of a large model is."""
    monkeypatch.setattr(dcp_target, "_SMALLEST", 4096)


@pytest.fixture(scope="session")
def fp8_release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small release in fp8, not to be written to."""
    directory = tmp_path_factory.mktemp("released") / "fp8"
    write_release(directory, small_model(), "fp8")
    return directory


@pytest.fixture(scope="session")
def bf16_release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small release in bf16, not to be written to."""
    directory = tmp_path_factory.mktemp("released") / "bf16"
    write_release(directory, small_model(), "bf16")
    return directory
