"""Threads that a rank computes with on CPU."""

import pytest

from dsv3.distributed.process_group import _threads


@pytest.mark.parametrize(
    ("asked", "ranks", "expected"),
    [
        (None, 1, 8),
        ("3", 1, 3),
        ("", 1, 8),
        ("0", 1, 8),
        ("many", 1, 8),
        ("1", 4, 2),  # torchrun's own
        (None, 16, 1),
    ],
)
def test_one_process_has_what_it_is_told_several_share_the_cores(
    monkeypatch: pytest.MonkeyPatch, asked: str | None, ranks: int, expected: int
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(8)))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if asked is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", asked)
    assert _threads(ranks) == expected
