"""The row of metrics of one step: a line of metrics.jsonl, and what loggers and plots get."""

import json
import math
from dataclasses import asdict, dataclass, fields
from typing import Any

from dsv3.untrusted_files import parse_json

SourceMetrics = dict[str, float | None]
"""`tokens` and `epochs` since step 0, and `evaluation_loss`, None but on evaluation steps."""


@dataclass(kw_only=True, slots=True)
class MetricsRow:
    """The metrics of one optimizer step; None is unknown.

    Attributes:
        step: optimizer steps done, from 1.
        loss: main next-token cross-entropy in nats, mean over the valid tokens of the step's global batch,
            without the MTP and balance terms. None for a step without a valid target; so is mtp_loss.
        mtp_loss: cross-entropy of the MTP depths in nats, each with the denominator of the report's eq. 24,
            mean over the depths, before its weight.
        balance_loss: sequence-wise load balance loss of the report's eq. 17, its factor alpha included.
        grad_norm: L2 norm of the whole gradient, before clipping.
        lr: learning rate of this step.
        tokens: places of the sequences trained on since step 0, this step included: sequences x length.
            Schedules go by them. `padding` says how many of a step's hold no token.
        tokens_per_second: places that all ranks together processed per second of this step, from the call
            for its data to its last operation, on a GPU by the device's clock; what is done between steps is
            left out.
        mfu: model FLOPs utilization (MFU), from 0 to 1; places of padding count like the others.
        memory_gib: peak memory of the busiest rank, GiB.
        evaluation_loss: held-out loss, defined like `loss`; None except on evaluation steps, and where no
            held-out row has a target.
        moe_max_violation: max load / mean load - 1 over the experts of a layer, the largest over MoE layers.
        moe_entropy: entropy of the expert load in units of log(experts), mean over MoE layers; 1 is
            perfectly even.
        moe_bias_range: max - min of the expert bias of a layer, the largest over MoE layers.
        fp8_broken_tiles: tiles with values that are not finite among the operands of the step's backward
            matmuls, over all ranks. None except under precision=fp8, and None where compiled layers meet a
            schedule that splits the backward pass.
        data_wait: seconds that rank 0's host waited in this step for its batch; they are part of the step's
            time. Where another rank waits longer the console says so.
        straggler: share of a step's time, from 0 to 1, for which other ranks wait for the slowest one, mean
            over the steps since the last value; None but at multiples of train.log_every, and on one rank.
        straggler_rank: the slowest rank, as long as straggler is known.
        skipped: steps that were skipped for bad numbers since step 0, this one included; accidents.jsonl has
            each.
        alarm: 1 while the loss is an alarm, above its past for train.accidents.alarm_steps steps; else 0.
        padding: share of this step's places that hold no token, from 0 to 1: above 0 for rows of best-fit
            packing and of padded tables.
        planned_tokens_per_second: what the plan says of tokens_per_second, for the batch of this step; None
            where the hardware's speed is not known: an uncalibrated CPU.
        planned_memory_gib: what the plan says of memory_gib. On a CPU it includes what the busiest rank's
            process held before its model was made, so that both can be compared.
        sources: by source of a mixture its tokens (places) and epochs since step 0, and its held-out loss;
            None without a mixture, and at steps that are neither an evaluation nor a multiple of
            train.log_every.
    """

    step: int
    loss: float | None = None
    mtp_loss: float | None = None
    balance_loss: float | None = None
    grad_norm: float | None = None
    lr: float | None = None
    tokens: int
    tokens_per_second: float | None = None
    mfu: float | None = None
    memory_gib: float | None = None
    evaluation_loss: float | None = None
    moe_max_violation: float | None = None
    moe_entropy: float | None = None
    moe_bias_range: float | None = None
    fp8_broken_tiles: float | None = None
    data_wait: float | None = None
    straggler: float | None = None
    straggler_rank: int | None = None
    skipped: int | None = None
    alarm: int | None = None
    padding: float | None = None
    planned_tokens_per_second: float | None = None
    planned_memory_gib: float | None = None
    sources: dict[str, SourceMetrics] | None = None

    def scalars(self) -> dict[str, int | float]:
        """Return the known, finite values by name, without the step: the values that a logger can draw.

        Those of a source are named sources/NAME/tokens and so on.
        """
        values: dict[str, int | float | None] = {}
        for name, value in _finite_values(self).items():
            if isinstance(value, dict):
                of_sources = ((f"{name}/{source}", own) for source, own in value.items())
                values |= {f"{place}/{key}": each for place, own in of_sources for key, each in own.items()}
            elif name != "step":
                values[name] = value
        return {name: value for name, value in values.items() if value is not None}

    def to_json(self) -> str:
        """Return the row as one line without its line feed; values that are not finite become null."""
        return json.dumps(_finite_values(self), allow_nan=False)

    @classmethod
    def from_json(cls, line: str) -> "MetricsRow":
        """Parse a line; missing fields become None and unknown ones are skipped.

        Raises:
            ValueError: the line is not a row, such as a line torn by a kill.
        """
        data = parse_json(line, "a row of metrics.jsonl")
        if not isinstance(data, dict) or not _is_count(data.get("step")) or not _is_count(data.get("tokens")):
            raise ValueError(f"not a row of metrics: {line[:80]!r}")
        return cls(**{field.name: data[field.name] for field in fields(cls) if field.name in data})


def _finite_values(row: MetricsRow) -> dict[str, Any]:
    """Return all fields by name in their order, None for a value that is not finite; of sources the same."""
    values = {name: _finite(name, value) for name, value in asdict(row).items() if name != "sources"}
    sources = {
        source: {name: _finite(name, value) for name, value in own.items()}
        for source, own in (row.sources or {}).items()
    }
    return {**values, "sources": sources or None}


def _finite(name: str, value: Any) -> int | float | None:
    if name in ("step", "tokens", "skipped", "alarm", "straggler_rank") and value is not None:
        return int(value)
    return float(value) if value is not None and math.isfinite(value) else None


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
