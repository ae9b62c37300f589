"""Worker side: steps with bad numbers on any layout, and what they have changed."""

from dataclasses import dataclass, replace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from dsv3.checkpoint.run_statistics import RunStatistics
from dsv3.checkpoint.state import local_tensor, model_state, optimizer_state
from dsv3.config.accidents import AccidentsConfig
from dsv3.config.root import Config
from dsv3.planning.layout import ParallelDims
from dsv3.training.gradient_places import ranked
from dsv3.training.muon import Muon
from dsv3.training.optimizer import build_optimizer
from dsv3.training.step import StepMetrics, TrainStep
from dsv3.training.step_guard import GOOD, NONFINITE, StepGuard
from tests.harness.accidents import spoil
from tests.harness.checkpoints import as_bytes
from tests.parallel.tiny_training import prepared, take_step

EXPERT = "layers.2.ffn.experts.down_proj"

FAULTS: dict[str, dict[str, Any]] = {
    "an expert's gradient on the rank that has it": {"kind": "nan", "parameter": EXPERT, "expert": 5},
    "everything on one rank": {"kind": "nan", "rank": 0},
    "the loss, which the last rank knows": {"kind": "loss"},
    "the loss of an MTP depth": {"kind": "mtp"},
    "all gradients too long": {"kind": "spike", "factor": 100.0},
}


@dataclass
class Skipped:
    """What a rank has seen of a step with a fault."""

    kind: int
    changed: list[str]
    """Tensors whose bytes are not those before the step; of the model, the optimizer and the norms."""
    named: str
    """The place that is told first, over all ranks."""


def skip_faults(
    config: Config, degrees: ParallelDims | None, microbatch: int, on_device: bool
) -> tuple[list[Skipped], list[str]]:
    """Take a good step, one with each fault, and a good one; return what the bad ones did and the last not.

    With `on_device` the optimizer skips by `found_inf`, as on a GPU, else the host does not call it.
    """
    setup = prepared(config, degrees, "configured")
    assert setup is not None
    model, _, ranks = setup
    optimizer = build_optimizer(config.optimizer, model.model_parts, config.precision.moments)
    if on_device and isinstance(optimizer, Muon):
        optimizer.fused = True  # Muon's choice on a GPU
    rules = AccidentsConfig(spike_window=1)
    guard = StepGuard(rules, RunStatistics(), ranks.device, optimizer)
    guard.asks_host = not on_device
    step = TrainStep(model.forward_backward, optimizer, ranks, 1.0, guard)
    take_step(step, 0, microbatch, "configured")
    found = []

    def state() -> dict[str, bytes]:
        named = [*model_state(model.model_parts), *optimizer_state(model.model_parts, optimizer)]
        tensors = {name: as_bytes(local_tensor(value.detach())) for name, value in named}
        return tensors | {"norms": repr(guard.good_norms()).encode()}

    def take_bad(fault: dict[str, Any]) -> StepMetrics:
        inner = model.forward_backward.train

        def train(*arguments: Any) -> Any:
            return spoil(model.model_parts, inner(*arguments), fault, ranks.rank)

        with patch.object(model.forward_backward, "train", train):
            return take_step(step, 1, microbatch, "configured")

    for fault in FAULTS.values():
        before = state()
        metrics = take_bad(fault)
        after = state()
        assert metrics.accident is not None
        assert metrics.gradient_places is not None
        kind = int(metrics.accident)
        own = step.places.report(metrics.gradient_places.tolist(), kind != NONFINITE)[0]
        places = [place for places in ranks.all_gather_object(own) for place in places]
        first = ranked(places, kind != NONFINITE)[:1]
        changed = [name for name in after if after[name] != before[name]]
        found.append(Skipped(kind, changed, first[0].name if first else ""))
    before = state()
    last = take_step(step, 1, microbatch, "configured")
    assert last.accident is not None
    assert int(last.accident) == GOOD
    after = state()
    return found, [name for name in after if after[name] == before[name]]


def losses_of(config: Config, microbatch: int, guarded: bool, steps: int = 3) -> list[dict[str, float]]:
    """Return the metrics of some steps of one process, with the rule or without any."""
    setup = prepared(replace(config), None, "configured")
    assert setup is not None
    model, optimizer, ranks = setup
    guard = StepGuard(AccidentsConfig(), RunStatistics(), torch.device("cpu"), optimizer) if guarded else None
    step = TrainStep(model.forward_backward, optimizer, ranks, 1.0, guard)
    known = [take_step(step, number, microbatch, "configured").known() for number in range(steps)]
    rule = ("accident", "skip", "spike_limit", "gradient_places")
    return [
        {name: _number(value) for name, value in metrics.items() if name not in rule} for metrics in known
    ]


def _number(value: Tensor) -> float:
    return float(value)
