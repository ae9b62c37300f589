"""task=plan prints one plan, by whatever it is started."""

import json

import pytest

from tests.harness.commands import TrainCommand


@pytest.mark.parametrize("rank", [None, 0, 1])
def test_of_several_ranks_the_first_one_prints(
    commands: TrainCommand, monkeypatch: pytest.MonkeyPatch, rank: int | None
) -> None:
    if rank is not None:
        monkeypatch.setenv("RANK", str(rank))
    outcome = commands.must("task=plan", "task.format=json")
    assert outcome.err == ""
    if rank == 1:
        assert outcome.out == ""
    else:
        assert json.loads(outcome.out)["world_size"] == 1
