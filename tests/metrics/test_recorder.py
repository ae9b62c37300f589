"""The message that ends a run names the values that are not finite, and no more than is known."""

import math
from pathlib import Path

import pytest
import torch

from dsv3.distributed.process_group import RankContext
from dsv3.errors import RunFailed
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
