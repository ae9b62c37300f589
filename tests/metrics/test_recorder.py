"""The message that ends a run names the values that are not finite, and no more than is known."""

import io
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dsv3.distributed.process_group import RankContext
from dsv3.errors import RunFailed
from dsv3.metrics.console import Console
from dsv3.metrics.recorder import Recorder
from dsv3.metrics.row import MetricsRow

ALONE = RankContext(rank=0, local_rank=0, world=1, device=torch.device("cpu"))


@pytest.mark.parametrize(
    ("figures", "evaluation", "told"),
    [
        ({"loss": math.nan, "grad_norm": 2.0}, None, "loss nan, grad_norm 2.0."),
        ({"loss": 0.0, "grad_norm": math.inf}, None, "loss 0.0, grad_norm inf."),
        (
            {"loss": 1.0, "grad_norm": math.nan, "fp8_broken_tiles": 3.0},
            None,
            "loss 1.0, grad_norm nan, 3 nonfinite FP8 tiles.",
        ),
        ({"loss": 1.0, "grad_norm": math.nan, "fp8_broken_tiles": 0.0}, None, "loss 1.0, grad_norm nan."),
        (
            {"loss": 1.0, "grad_norm": math.nan, "fp8_broken_tiles": math.nan},
            None,
            "loss 1.0, grad_norm nan.",
        ),
        ({"loss": 1.5}, math.nan, "loss 1.5, evaluation_loss nan."),
    ],
)
def test_the_message_names_only_known_metrics(
    tmp_path: Path, figures: dict[str, float], evaluation: float | None, told: str
) -> None:
    recorder = Recorder(tmp_path / "metrics.jsonl", ALONE, 1, None, None)
    row = MetricsRow(step=7, tokens=8, evaluation_loss=evaluation)
    with pytest.raises(RunFailed) as failed:
        recorder.add(row, {name: torch.tensor(value) for name, value in figures.items()})
    assert str(failed.value).startswith(f"step 7 is not finite: {told} Checkpoints")


@pytest.mark.parametrize(
    ("elsewhere", "told"),
    [(0.04, ""), (0.5, "a rank waits for its data 50% of the time, rank 0 10%\n"), (0.19, ""), (0.1, "")],
)
def test_another_rank_that_waits_for_its_data_is_told_by_the_collective_that_finds_the_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, elsewhere: float, told: str
) -> None:
    clock, reduced, stream = iter([100.0, 110.0, 120.0]), [], io.StringIO()
    monkeypatch.setattr("dsv3.metrics.recorder.time", SimpleNamespace(monotonic=lambda: next(clock)))

    def largest(value: torch.Tensor) -> torch.Tensor:
        reduced.append(value.tolist()[1])
        return torch.maximum(value, torch.tensor([3.0 * 2**30, elsewhere]))

    ranks: Any = SimpleNamespace(is_main=True, device=torch.device("cpu"), max=largest)
    recorder = Recorder(tmp_path / "metrics.jsonl", ranks, 1, Console(log_every=100, file=stream), None)
    for step, waited in ((2, 0.25), (3, 0.75)):
        recorder.add(MetricsRow(step=step, tokens=8, data_wait=waited), {})
    steps = stream.getvalue()
    recorder.flush()
    recorder.close()
    assert reduced == [0.0, pytest.approx(0.1)]  # 1 of 10 seconds; 0.1 there is rank 0's own
    assert stream.getvalue() == steps + told
    assert recorder.memory >= 3.0
