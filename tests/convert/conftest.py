from pathlib import Path

import pytest

from dsv3.convert import dcp_target
from tests.convert.releases import small_model, write_release


@pytest.fixture
def many_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut a small DCP into many files, like that of a large model."""
    monkeypatch.setattr(dcp_target, "_SMALLEST", 4096)


@pytest.fixture(scope="session")
def fp8_release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a small HF checkpoint in fp8, which tests must not change."""
    directory = tmp_path_factory.mktemp("released") / "fp8"
    write_release(directory, small_model(), "fp8")
    return directory


@pytest.fixture(scope="session")
def bf16_release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a small HF checkpoint in bf16, which tests must not change."""
    directory = tmp_path_factory.mktemp("released") / "bf16"
    write_release(directory, small_model(), "bf16")
    return directory
