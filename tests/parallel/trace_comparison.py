"""Compare the traces of a layout with that of one process: what must agree, and to which tolerance."""

import pytest
import torch

from tests.parallel.tiny_training import Trace

TOLERANCE = 1e-5


def assert_equal(traces: list[Trace | None], single: Trace, tolerance: float = TOLERANCE) -> None:
    """Assert that every metric, gradient of every step and parameter agree to `tolerance` of their norm.

    A rank may have some of the parameters; all ranks together have them all.
    """
    there = [trace for trace in traces if trace is not None]
    for trace in there:
        for ours, theirs in zip(trace.metrics, single.metrics, strict=True):
            assert ours == {name: pytest.approx(value, rel=tolerance) for name, value in theirs.items()}
        for mine, whole in zip(trace.gradients, single.gradients, strict=True):
            assert_close(mine, whole, tolerance)
        assert_close(trace.state, single.state, tolerance)
        assert trace.evaluation == pytest.approx(single.evaluation, rel=tolerance)
    assert set().union(*(trace.gradients[0] for trace in there)) == set(single.gradients[0])
    assert set().union(*(trace.state for trace in there)) == set(single.state)


def assert_close(
    mine: dict[str, torch.Tensor], whole: dict[str, torch.Tensor], tolerance: float = TOLERANCE
) -> None:
    """Assert that each tensor's error is within `tolerance` of its norm."""
    assert mine
    errors = {name: relative_error(tensor, whole[name]) for name, tensor in mine.items()}
    bad = {name: f"{error:.1e}" for name, error in errors.items() if not error <= tolerance}
    assert not bad, bad


def relative_error(mine: torch.Tensor, whole: torch.Tensor) -> float:
    """Return the norm of the difference per norm of `whole`."""
    return float((mine - whole).norm() / whole.norm().clamp(min=1e-12))
