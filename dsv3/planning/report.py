"""Report a plan as a table, and refuse a run that does not fit with the nearest change that fits."""

from dataclasses import replace

from dsv3.config.parallel import RecomputeMode
from dsv3.errors import UserError
from dsv3.planning import parameters
from dsv3.planning.layout import ParallelDims, tensor_degrees
from dsv3.planning.memory import rank_memory
from dsv3.planning.parameters import FlopsConvention, Weight, numel
from dsv3.planning.plan import Plan
from dsv3.planning.sharding import is_gathered_in_fp8, uses_fp8_matmul
from dsv3.planning.step_shape import StepShape

GIB = 2**30

MAX_SHARDS = 2**16
"""More shards than any cluster has ranks: a plan that does not fit there fits nowhere."""


def require_fits(plan: Plan) -> None:
    """Raise UserError for a plan that does not fit, in two lines with the numbers and the nearest fix."""
    if plan.fits is False:
        model = f"{parameters.total(plan.model):,} parameters"
        layout = f"{model} on {plan.world_size:,} ranks of hardware={plan.hardware.name}"
        raise UserError(f"{layout} do not fit: a rank {describe_need(plan)}\n{suggest_fix(plan)}")


def describe_need(plan: Plan) -> str:
    """Return `needs X GiB, has Y GiB` for a plan whose device memory is known."""
    return f"needs {plan.memory.total / GIB:,.2f} GiB, has {(plan.hardware.memory_bytes or 0) / GIB:,.2f} GiB"


def suggest_fix(plan: Plan) -> str:
    """Describe the nearest change that makes a plan fit: on the same ranks, with more shards, or both."""
    if plan.shape.host_copies:
        waiting = _change(plan, replace(plan.shape, host_copies=False), plan.degrees)
        if waiting.fits:
            return "checkpoint.async_save=false fits on the same ranks"
        return suggest_fix(waiting)
    for mode in (RecomputeMode.selective, RecomputeMode.full):
        recomputing = _change(plan, replace(plan.shape, recompute=mode), plan.degrees)
        if recomputing.fits:
            return f"recompute={mode.value} fits on the same ranks"
    smallest = smallest_dp_shard(plan)
    if smallest is not None:
        return describe_dp_shard(smallest)
    smallest = smallest_dp_shard(recomputing)
    if smallest is not None:
        return f"recompute=full and {describe_dp_shard(smallest)}"
    within = recomputing.memory.to_json()["activations"] / GIB
    shape = plan.shape
    sizes = [f"train.microbatch_size={shape.microbatch_size}"] if shape.microbatch_size > 1 else []
    sizes += [f"train.sequence_length={shape.sequence_length}"]
    degrees = " or ".join(f"parallel.degrees.{axis}" for axis in _raisable(plan))
    return (
        f"no dp_shard helps, {within:,.2f} GiB live within a step under recompute=full: "
        f"lower {' or '.join(sizes)}{degrees and f', or raise {degrees}'}"
    )


def _raisable(plan: Plan) -> list[str]:
    """List the axes that split a step's activations and whose degree the model lets grow."""
    degrees, model = plan.degrees, plan.model
    experts = model.num_moe_layers > 0 and degrees.ep < model.moe.num_experts
    tensor = degrees.tp < max(tensor_degrees(model))
    grows = {"ep": experts, "tp": tensor, "pp": degrees.pp < model.num_layers}
    return [axis for axis, possible in grows.items() if possible]


def smallest_dp_shard(plan: Plan) -> ParallelDims | None:
    """Return degrees with the smallest power-of-two multiple of dp_shard that fits; the world grows with it.

    Returns None if no number of ranks fits, as when activations alone are too large.
    """
    degrees = plan.degrees
    while degrees.dp_shard < MAX_SHARDS:
        degrees = replace(degrees, dp_shard=2 * degrees.dp_shard)
        if _change(plan, plan.shape, degrees).fits:
            return degrees
    return None


def _change(plan: Plan, shape: StepShape, degrees: ParallelDims) -> Plan:
    """Return the plan on other degrees or with another shape; its traffic stays that of the old plan."""
    memory = rank_memory(plan.model, degrees, shape)
    return replace(plan, shape=shape, degrees=degrees, memory=memory)


def describe_dp_shard(degrees: ParallelDims) -> str:
    """Say that these degrees fit, and how many ranks they take."""
    world = f"launch.nproc x launch.nnodes = {degrees.world_size:,} ranks"
    return f"parallel.degrees.dp_shard={degrees.dp_shard} fits, with {world}"


def format_plan(plan: Plan) -> str:
    """Format the plan as a table for people, without a newline at its end."""
    parts = (
        _model_rows(plan),
        _memory_rows(plan),
        _time_rows(plan),
        _upkeep_rows(plan),
        _verdict_rows(plan),
    )
    rows = [row for part in parts for row in (*part, ("", ""))][:-1]
    width = max(len(name) for name, _ in rows) + 2
    return "\n".join(f"{name:<{width}}{value}".rstrip() for name, value in rows)


def _model_rows(plan: Plan) -> list[tuple[str, str]]:
    model, moe, shape = plan.model, plan.model.moe, plan.shape
    layers = f"{model.num_layers} layers ({model.num_dense_layers} dense) + {model.mtp_depths} MTP"
    causal, square = (plan.flops_per_token(convention) / 1e9 for convention in FlopsConvention)
    axes = " x ".join(f"{axis} {n}" for axis, n in plan.degrees.to_json().items() if axis != "ep")
    batch = f"{shape.microbatch_size} x {shape.sequence_length:,} tokens, {shape.microbatches} per step"
    rows = [
        ("model", f"{layers}, dim {model.dim:,}, top {moe.top_k} of {moe.num_experts} experts"),
        ("parameters", f"{parameters.total(model):,}"),
        ("active parameters", f"{parameters.active(model):,}"),
        ("FLOPs per token", f"{causal:,.3f} G causal, {square:,.3f} G full square"),
        ("hardware", plan.hardware.name),
        *([("precision", f"{plan.precision}: {plan.precision_reason}")] if plan.precision else []),
        ("layout", f"{plan.world_size:,} ranks = {axes}; ep {plan.degrees.ep}"),
    ]
    if plan.degrees.pp > 1:
        p = shape.pipelining
        rows.append(("schedule", f"{p.schedule.name}, {plan.degrees.pp} ranks x {p.per_rank} stages"))
    sequences = shape.microbatch_size * shape.microbatches * plan.degrees.data_parallel
    tokens = sequences * shape.sequence_length
    rows.append(("batch", f"{sequences:,} sequences, {tokens:,} tokens per step"))
    rows.append(("microbatch", f"{batch} and rank, recompute {shape.recompute.value}"))
    rows.append(("bytes per parameter", shape.state.to_text()))
    return rows + _fp8_rows(plan)


def _fp8_rows(plan: Plan) -> list[tuple[str, str]]:
    """Return the shares of the parameters in FP8 matmuls and all-gathers, and if token dispatch is in FP8."""
    model, fp8 = plan.model, plan.shape.fp8
    if fp8 is None:
        return []
    every = parameters.every_weight(model)

    def share(some: list[Weight]) -> str:
        return f"{numel(some):,} parameters, {numel(some) / numel(every):.1%}"

    in_matmuls = [weight for weight in every if uses_fp8_matmul(weight)]
    rows = [("matmuls in FP8", share(in_matmuls))]
    if fp8.gather:
        gathered = [weight for weight in in_matmuls if is_gathered_in_fp8(weight, plan.degrees)]
        rows.append(("gathered in FP8", share(gathered)))
    if fp8.dispatch and plan.degrees.ep > 1:
        rows.append(("rows to experts", "FP8, and back in the compute dtype"))
    return rows


def _time_rows(plan: Plan) -> list[tuple[str, str]]:
    sent = {name: value for name, value in vars(plan.traffic).items() if value}
    sent["all axes"] = plan.traffic.total
    unit, scale = _unit(plan.traffic.total)
    rows = [(f"  {name}", f"{value / scale:>10,.2f}") for name, value in sent.items()]
    return [("sent per step", f"{unit:>10}"), *rows, ("bubble", f"{plan.bubble:>10.1%}")]


def _upkeep_rows(plan: Plan) -> list[tuple[str, str]]:
    """Return the costs of an evaluation and a sample, and the KV cache of one."""
    titles = f"{'seconds':>10}{'of training':>13}{'GiB sent':>12}{'gathers':>10}{'tokens':>12}"
    costs = plan.between_steps
    sample = costs.sample()
    rows = [("between steps", titles)]
    for name, cost in (("  evaluation", costs.evaluation()), ("  sample", sample)):
        if cost is None:
            rows.append((name, f"{'-':>10}{'-':>13}{'-':>12}{'-':>10}{'all':>12}"))
            continue
        share = "-" if cost.share is None else f"{cost.share:.1%}"
        of_time = f"{cost.seconds:>10,.2f}{share:>13}"
        rows.append((name, f"{of_time}{cost.sent / GIB:>12,.2f}{cost.gathers:>10,}{cost.tokens:>12,}"))
    if sample.share is not None and sample.seconds > costs.upkeep.generate_seconds:
        rows.append(("  cut off after", f"{costs.upkeep.generate_seconds:>10,.2f}"))
    rows.append(("  KV cache, MiB", f"{sample.cache / 2**20:>10,.2f}"))
    return rows


def _memory_rows(plan: Plan) -> list[tuple[str, str]]:
    parts = {name.replace("_", " "): value for name, value in vars(plan.memory).items()}
    on_host, pinned = parts.pop("offloaded"), parts.pop("pinned")
    if not plan.shape.host_copies:
        del parts["save copies"]
    parts["total"] = plan.memory.total
    if on_host:
        parts["on the host"] = on_host
    if pinned:
        parts["pinned memory"] = pinned
    unit, scale = _unit(plan.memory.total)
    rows = [(f"  {name}", f"{value / scale:>10,.2f}") for name, value in parts.items()]
    limit = plan.hardware.memory_bytes
    device = f"{'unknown':>10}" if limit is None else f"{limit / scale:>10,.2f}"
    return [("memory per rank", f"{unit:>10}"), *rows, ("  device memory", device)]


def _unit(total: int) -> tuple[str, int]:
    """Return the unit of a table and its bytes: GiB, or MiB for less than one."""
    return ("GiB", GIB) if total >= GIB or not total else ("MiB", GIB // 1024)


def _verdict_rows(plan: Plan) -> list[tuple[str, str]]:
    if plan.fits is None:
        return [("verdict", "unknown: hardware.memory_bytes is not known")]
    if plan.fits:
        return [("verdict", "fits")]
    smallest = smallest_dp_shard(plan)
    fix = (
        ("nearest fix", suggest_fix(plan)) if smallest is None else ("would fit", describe_dp_shard(smallest))
    )
    return [("verdict", f"does not fit: {describe_need(plan)}"), fix]
