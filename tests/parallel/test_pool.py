"""The pool: an error in a worker fails the test at once, a worker that dies gets one more try."""

from pathlib import Path

import pytest

from tests.harness.pool import Pool, WorkerError
from tests.parallel.failing_workers import die, die_once, raise_once


def test_a_call_in_which_a_process_died_is_made_again(pool: Pool, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="rank 1: died with exit code -9"):
        assert pool.run(die_once, tmp_path / "mark") == list(range(pool.size))


def test_dying_again_and_raising_fail(pool: Pool, tmp_path: Path) -> None:
    with (
        pytest.warns(UserWarning, match="rank 1: died"),
        pytest.raises(WorkerError, match="rank 1: died with exit code -9"),
    ):
        pool.run(die)
    with pytest.raises(WorkerError, match="ValueError: as asked"):
        pool.run(raise_once, tmp_path / "mark")
    assert pool.run(raise_once, tmp_path / "mark") == [None] * pool.size
