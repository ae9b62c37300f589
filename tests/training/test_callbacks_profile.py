"""profile=on: traces of the profiled steps, and a record of allocations that begins, is bounded and ends."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from dsv3.config.launch import ProfileConfig
from dsv3.training import callbacks
from dsv3.training.callbacks import MEMORY_EVENTS, Profile, TrainingRun


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, str]]:
    """What is done to CUDA's record of allocations, each with the steps done by then."""
    seen: list[tuple[int, str]] = []
    done[0] = 0
    monkeypatch.setattr(
        callbacks, "record_memory_history", lambda n: seen.append((done[0], f"record {n}" if n else "end"))
    )
    monkeypatch.setattr(callbacks, "write_memory_snapshot", lambda path: seen.append((done[0], "write")))
    return seen


done = [0]


def train(config: ProfileConfig, folder: Path, device: str, steps: int) -> None:
    """Take steps under the callback, as the loop does."""
    ranks = SimpleNamespace(rank=0, device=torch.device(device))
    run = cast(TrainingRun, SimpleNamespace(directory=folder, ranks=ranks))
    profiling: Any = Profile(config)
    profiling.on_train_start(run)
    for step in range(1, steps + 1):
        torch.ones(3).sum()
        done[0] = step
        profiling.on_step_end(run)
    profiling.close(failed=False)


pytestmark = pytest.mark.filterwarnings("ignore:.*(CUDA|Warning).*:UserWarning")


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        # Steps 1 and 2 wait, 3 warms up, 4 and 5 are profiled.
        (8, [(3, f"record {MEMORY_EVENTS}"), (5, "write"), (5, "end")]),
        # The run ends within the profiled steps: what there is is written.
        (4, [(3, f"record {MEMORY_EVENTS}"), (4, "write"), (4, "end")]),
        (2, []),
    ],
)
def test_allocations_are_recorded_while_steps_are_profiled_and_no_longer(
    recorded: list[tuple[int, str]], tmp_path: Path, steps: int, expected: list[tuple[int, str]]
) -> None:
    train(ProfileConfig(enabled=True, wait=2, steps=2), tmp_path, "cuda", steps)
    assert recorded == expected
    assert (tmp_path / "profile" / "trace-rank0.json").exists() == bool(expected)


def test_a_cpu_has_a_trace_alone(recorded: list[tuple[int, str]], tmp_path: Path) -> None:
    train(ProfileConfig(enabled=True, wait=0, steps=1), tmp_path, "cpu", 3)
    assert not recorded
    assert (tmp_path / "profile" / "trace-rank0.json").exists()
