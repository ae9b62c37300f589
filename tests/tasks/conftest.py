from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.checkpoint.running import Commands


@pytest.fixture
def commands(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> Iterator[Commands]:
    """train.py in this process, started in an empty directory."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield Commands(monkeypatch, capsys, tmp_path)
    torch.set_num_threads(threads)
