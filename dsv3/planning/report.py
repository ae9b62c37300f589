"""A plan as a table for people."""

from dsv3.metrics.flops import FlopsConvention
from dsv3.planning import parameters
from dsv3.planning.advice import GIB, advice, needs, shards_that_fit, smallest_dp_shard
from dsv3.planning.fp8 import fp8_rows
from dsv3.planning.plan import Plan


def to_text(plan: Plan) -> str:
    """A table for people, without a line feed at its end."""
    parts = (_model_rows(plan), _memory_rows(plan), _time_rows(plan), _verdict_rows(plan))
    rows = [row for part in parts for row in (*part, ("", ""))][:-1]
    width = max(len(name) for name, _ in rows) + 2
    return "\n".join(f"{name:<{width}}{value}".rstrip() for name, value in rows)


def _model_rows(plan: Plan) -> list[tuple[str, str]]:
    model, moe, shape = plan.model, plan.model.moe, plan.shape
    layers = f"{model.num_layers} layers ({model.num_dense_layers} dense) + {model.mtp_depths} MTP"
    causal, square = (plan.flops_per_token(convention) / 1e9 for convention in FlopsConvention)
    axes = " x ".join(f"{axis} {n}" for axis, n in plan.degrees.to_json().items() if axis != "ep")
    batch = f"{shape.microbatch_size} x {shape.sequence_length:,} tokens, {shape.microbatches} a step"
    return [
        ("model", f"{layers}, dim {model.dim:,}, top {moe.top_k} of {moe.num_experts} experts"),
        ("parameters", f"{parameters.total(model):,}"),
        ("active parameters", f"{parameters.active(model):,}"),
        ("FLOPs a token", f"{causal:,.3f} G causal, {square:,.3f} G full square"),
        ("hardware", plan.hardware.name),
        ("layout", f"{plan.world_size:,} ranks = {axes}; ep {plan.degrees.ep}"),
        *_pipeline_rows(plan),
        ("microbatch", f"{batch}, recompute {shape.recompute.value}"),
        ("bytes a parameter", shape.state.to_text()),
        *fp8_rows(model, plan.degrees, shape.fp8),
    ]


def _pipeline_rows(plan: Plan) -> list[tuple[str, str]]:
    if plan.degrees.pp == 1:
        return []
    p = plan.shape.pipelining
    return [("schedule", f"{p.schedule.name}, {plan.degrees.pp} ranks x {p.per_rank} stages")]


def _time_rows(plan: Plan) -> list[tuple[str, str]]:
    sent = {name: value for name, value in vars(plan.traffic).items() if value}
    sent["all axes"] = plan.traffic.total
    rows = [(f"  {name}", f"{value / GIB:>10,.2f}") for name, value in sent.items()]
    return [("sent in a step", f"{'GiB':>10}"), *rows, ("bubble", f"{plan.bubble:>10.1%}")]


def _memory_rows(plan: Plan) -> list[tuple[str, str]]:
    parts = {name.replace("_", " "): value for name, value in vars(plan.memory).items()}
    on_host = parts.pop("offloaded")
    if not plan.shape.staged:
        del parts["save copies"]
    parts["total"] = plan.memory.total
    if on_host:
        parts["on the host"] = on_host
    rows = [(f"  {name}", f"{value / GIB:>10,.2f}") for name, value in parts.items()]
    limit = plan.hardware.memory_bytes
    device = f"{'unknown':>10}" if limit is None else f"{limit / GIB:>10,.2f}"
    return [("memory a rank", f"{'GiB':>10}"), *rows, ("  device memory", device)]


def _verdict_rows(plan: Plan) -> list[tuple[str, str]]:
    if plan.fits is None:
        return [("verdict", "unknown: hardware.memory_bytes is not known")]
    if plan.fits:
        return [("verdict", "fits")]
    rows = [("verdict", f"does not fit: {needs(plan)}")]
    smallest = smallest_dp_shard(plan)
    return [
        *rows,
        ("nearest fix", advice(plan)) if smallest is None else ("would fit", shards_that_fit(smallest)),
    ]
