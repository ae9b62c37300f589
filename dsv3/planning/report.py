"""Whether a plan fits, and the nearest change that would make it fit.

A plan as a table for people.
"""

from dataclasses import replace

from dsv3.config.parallel import Recomputed
from dsv3.errors import UserError
from dsv3.planning import parameters
from dsv3.planning.layout import ParallelDims
from dsv3.planning.memory import rank_memory
from dsv3.planning.parameters import FlopsConvention
from dsv3.planning.plan import Plan
from dsv3.planning.step_shape import StepShape, fp8_rows

GIB = 2**30

# More shards than any cluster has ranks: what does not fit there fits nowhere.
MOST_SHARDS = 2**16


def require_fits(plan: Plan) -> None:
    """Raise UserError, in two lines with the numbers and the nearest fix, for a plan that does not fit."""
    if plan.fits is False:
        model = f"{parameters.total(plan.model):,} parameters"
        layout = f"{model} on {plan.world_size:,} ranks of hardware={plan.hardware.name}"
        raise UserError(f"{layout} do not fit: a rank {needs(plan)}\n{advice(plan)}")


def needs(plan: Plan) -> str:
    """`needs X GiB, has Y GiB` of a plan whose device memory is known."""
    return f"needs {plan.memory.total / GIB:,.2f} GiB, has {(plan.hardware.memory_bytes or 0) / GIB:,.2f} GiB"


def advice(plan: Plan) -> str:
    """The nearest change that makes a plan fit: on the same ranks, with more shards, or both."""
    if plan.shape.staged:
        waiting = _with(plan, replace(plan.shape, staged=False), plan.degrees)
        if waiting.fits:
            return "checkpoint.async_save=false fits on the same ranks"
        return advice(waiting)
    for mode in (Recomputed.selective, Recomputed.full):
        recomputing = _with(plan, replace(plan.shape, recompute=mode), plan.degrees)
        if recomputing.fits:
            return f"recompute={mode.value} fits on the same ranks"
    smallest = smallest_dp_shard(plan)
    if smallest is not None:
        return shards_that_fit(smallest)
    smallest = smallest_dp_shard(recomputing)
    if smallest is not None:
        return f"recompute=full and {shards_that_fit(smallest)}"
    within = recomputing.memory.to_json()["activations"] / GIB
    shape = plan.shape
    sizes = f"train.microbatch_size={shape.microbatch_size} or sequence_length={shape.sequence_length}"
    return (
        f"no dp_shard helps, {within:,.2f} GiB live within a step under recompute=full: "
        f"lower {sizes}, or raise parallel.degrees.ep, tp or pp"
    )


def smallest_dp_shard(plan: Plan) -> ParallelDims | None:
    """ParallelDims with the smallest power-of-two multiple of dp_shard, the world growing with it, that fit.

    None where no number of ranks does, as when activations alone are too large.
    """
    degrees = plan.degrees
    while degrees.dp_shard < MOST_SHARDS:
        degrees = replace(degrees, dp_shard=2 * degrees.dp_shard)
        if _with(plan, plan.shape, degrees).fits:
            return degrees
    return None


def _with(plan: Plan, shape: StepShape, degrees: ParallelDims) -> Plan:
    """The same plan on other degrees or of another shape; what is sent is left as it was."""
    memory = rank_memory(plan.model, degrees, shape)
    return replace(plan, shape=shape, degrees=degrees, memory=memory)


def shards_that_fit(degrees: ParallelDims) -> str:
    """That these degrees fit, and the ranks that they take."""
    world = f"launch.nproc x launch.nnodes = {degrees.world_size:,} ranks"
    return f"parallel.degrees.dp_shard={degrees.dp_shard} fits, with {world}"


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
