"""One line of metrics.jsonl."""

import json
import math
from dataclasses import asdict, dataclass, fields


@dataclass(kw_only=True, slots=True)
class MetricsRow:
    """What is known after one optimizer step; None is unknown.

    step: optimizer steps done, from 1.
    loss: main next-token cross-entropy in nats, mean over the valid tokens of the step's global batch,
        without the MTP and balance terms.
    mtp_loss: cross-entropy of the MTP depths in nats, each with the denominator of the report's eq. 24,
        mean over the depths, before its weight.
    balance_loss: sequence-wise balance loss of the report's eq. 17, its factor alpha included.
    grad_norm: L2 norm of the whole gradient, before clipping.
    lr: learning rate of this step.
    tokens: training tokens seen since step 0, this step's included.
    tokens_per_second: of all ranks together.
    mfu: model FLOPs utilization, a share from 0 to 1.
    memory_gib: peak memory of the busiest rank, GiB.
    evaluation_loss: held-out loss, defined like `loss`; None but on evaluation steps.
    moe_max_violation: max load / mean load - 1 over the experts of a layer, the largest over MoE layers.
    moe_entropy: entropy of the expert load in units of log(experts), 1 is perfectly even, mean over layers.
    moe_bias_range: max - min of the selection bias of a layer, the largest over MoE layers.
    fp8_broken_tiles: tiles with numbers that are not finite among the operands of the step's backward
        products, over all ranks; None but under precision=fp8, and where compiled layers meet a schedule
        that splits the backward pass.
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

    def scalars(self) -> dict[str, int | float]:
        """The known, finite values by name, the step left out: what a logger can draw."""
        return {name: value for name, value in _written(self).items() if value is not None and name != "step"}

    def to_json(self) -> str:
        """One line without its line feed; what is not finite becomes null."""
        return json.dumps(_written(self), allow_nan=False)

    @classmethod
    def from_json(cls, line: str) -> "MetricsRow":
        """The row of a line; missing fields become None and unknown ones are passed over.

        Raises ValueError for a line that is no row, such as one torn by a kill.
        """
        data = json.loads(line)
        if not isinstance(data, dict) or not _is_count(data.get("step")) or not _is_count(data.get("tokens")):
            raise ValueError(f"no row of metrics: {line[:80]!r}")
        return cls(**{field.name: data[field.name] for field in fields(cls) if field.name in data})


def _written(row: MetricsRow) -> dict[str, int | float | None]:
    counts = {"step": int(row.step), "tokens": int(row.tokens)}
    return {name: counts.get(name, _finite(value)) for name, value in asdict(row).items()}


def _finite(value: float | None) -> float | None:
    return float(value) if value is not None and math.isfinite(value) else None


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
