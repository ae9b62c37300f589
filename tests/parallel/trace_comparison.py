"""Compare the traces of a layout with that of one process: what must agree, and to which tolerance."""

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from dsv3.config.root import Config
from dsv3.planning.layout import ParallelDims
from tests.harness.pool import Pool
from tests.parallel.tiny_training import Shard, Tensors, Trace, train_config

TOLERANCE = 1e-5


def train_on(
    pool: Pool, config: Config, degrees: ParallelDims, steps: int, microbatch: int, optimizer: str = "sgd"
) -> list[Trace]:
    """Train on a layout; return the traces of its ranks."""
    return whole_traces(pool.run(train_config, config, degrees, steps, microbatch, optimizer))


def whole_traces(found: Sequence[Trace | None]) -> list[Trace]:
    """Return the traces of the ranks that have one, with whole tensors in place of shards.

    Each rank's own shards stand in its tensors: where replicas differ, so do the tensors of their ranks.
    """
    there = [trace for trace in found if trace is not None]
    steps = [_joined([trace.gradients[step] for trace in there]) for step in range(len(there[0].gradients))]
    states = _joined([trace.state for trace in there])
    return [
        Trace(trace.metrics, [step[rank] for step in steps], states[rank], trace.evaluation)
        for rank, trace in enumerate(there)
    ]


def _joined(ranks: Sequence[dict[str, Any]]) -> list[Tensors]:
    """Return each rank's tensors, whole."""
    whole: Tensors = {}
    for name, part in ((name, part) for rank in ranks for name, part in rank.items()):
        if isinstance(part, Shard):
            # What no rank has stays nan, and compares with nothing.
            _place(whole.setdefault(name, torch.full(part.shape, math.nan, dtype=part.values.dtype)), part)
    return [{name: _whole(part, whole.get(name)) for name, part in rank.items()} for rank in ranks]


def _whole(part: Any, joined: torch.Tensor | None) -> torch.Tensor:
    if not isinstance(part, Shard):
        assert isinstance(part, torch.Tensor)
        return part
    assert joined is not None
    if torch.equal(joined[_box(part)], part.values) or not part.values.numel():
        return joined
    own = joined.clone()
    _place(own, part)
    return own


def _place(tensor: torch.Tensor, part: Shard) -> None:
    if part.values.numel():
        tensor[_box(part)] = part.values


def _box(part: Shard) -> tuple[slice, ...]:
    return tuple(slice(a, a + n) for a, n in zip(part.offset, part.values.shape, strict=True))


def assert_equal(traces: Sequence[Trace], single: Trace, tolerance: float = TOLERANCE) -> None:
    """Assert that every metric, gradient of every step and parameter agree to `tolerance` of their norm.

    A rank may have some of the parameters; all ranks together have them all.
    """
    for trace in traces:
        for ours, theirs in zip(trace.metrics, single.metrics, strict=True):
            assert ours == {name: pytest.approx(value, rel=tolerance) for name, value in theirs.items()}
        for mine, whole in zip(trace.gradients, single.gradients, strict=True):
            assert_close(mine, whole, tolerance)
        assert_close(trace.state, single.state, tolerance)
        assert trace.evaluation == pytest.approx(single.evaluation, rel=tolerance)
    assert set().union(*(trace.gradients[0] for trace in traces)) == set(single.gradients[0])
    assert set().union(*(trace.state for trace in traces)) == set(single.state)


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
