from types import SimpleNamespace
from typing import cast

import pytest
import torch

from dsv3.data.batch import Batch
from dsv3.parallel.pipeline_parallel import PipelineForwardBackward
from dsv3.training.loss import LossDenominators
from dsv3.training.schedule import StepHyperparameters


@pytest.mark.parametrize("cause", [ValueError("what went wrong"), None])
def test_what_went_wrong_in_a_stage_is_told_not_the_shapes_of_its_inputs(cause: Exception | None) -> None:
    """PyTorch raises an error of its own, with the shapes of all inputs, from the one that matters."""

    def step(**inputs: object) -> None:
        raise RuntimeError("failed to run forward: args [...]") from cause

    forward_backward = PipelineForwardBackward.__new__(PipelineForwardBackward)
    forward_backward.stages, forward_backward.count, forward_backward.schedule = (
        {},
        2,
        SimpleNamespace(step=step),
    )
    forward_backward.num_microbatches = 1
    batch = Batch(*(torch.zeros(1, 4, dtype=torch.int64) for _ in range(3)))
    expected = ValueError if cause else RuntimeError
    with pytest.raises(expected, match="what went wrong" if cause else "failed to run forward"):
        forward_backward.train([batch], cast(LossDenominators, None), cast(StepHyperparameters, None))
