"""Report a plan as a table for people."""

from dsv3.config.hardware import CPU, calibrate_command
from dsv3.planning import parameters
from dsv3.planning.parameters import FlopsConvention, Weight, numel
from dsv3.planning.plan import Plan
from dsv3.planning.sharding import is_gathered_in_fp8, uses_fp8_matmul

GIB = 2**30

SMALL_SHARE = 0.005
"""Causes below this share of a step have no row."""


def describe_need(plan: Plan) -> str:
    """Return `needs X GiB, has Y GiB` for a plan whose device memory is known."""
    return f"needs {plan.memory.total / GIB:,.2f} GiB, has {(plan.hardware.memory_bytes or 0) / GIB:,.2f} GiB"


def format_plan(plan: Plan, fix: str = "") -> str:
    """Format the plan as a table for people, without a newline at its end.

    `fix` is the nearest change that fits, for a plan that does not (launch/nearest_fix.py).
    """
    parts = (
        _model_rows(plan),
        _memory_rows(plan),
        _traffic_rows(plan),
        _time_rows(plan),
        _upkeep_rows(plan),
        _verdict_rows(plan, fix),
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
    rows += _run_rows(plan)
    rows.append(("microbatch", f"{batch} and rank, recompute {shape.recompute.value}"))
    rows.append(("bytes per parameter", shape.state.to_text()))
    return rows + _fp8_rows(plan)


def _run_rows(plan: Plan) -> list[tuple[str, str]]:
    """Return the ramp of the batch size, and the steps and tokens of the run."""
    batch = plan.batch
    if batch is None:
        return []
    rows = []
    if batch.start is not None:
        count, idle = plan.first_step()
        rows.append(("batch ramp", batch.told()))
        first = f"{count:,} microbatches" + (f", bubble {idle:.1%}" if plan.degrees.pp > 1 else "")
        rows.append(
            ("", f"step 1 has {first}; step {batch.ramp_steps + 1:,} is the first of the whole batch")
        )
    return [*rows, ("run", f"{plan.steps:,} steps, {plan.tokens:,} tokens")]


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


def _traffic_rows(plan: Plan) -> list[tuple[str, str]]:
    sent = {name: value for name, value in vars(plan.traffic).items() if value}
    sent["all axes"] = plan.traffic.total
    unit, scale = _unit(plan.traffic.total)
    crossing, total = plan.between_nodes, plan.traffic.total
    crossing["all axes"] = sum(sent[name] * crossing[name] for name in crossing if name in sent) / max(
        total, 1
    )
    several = crossing["all axes"] > 0
    rows = [
        (f"  {name}", f"{value / scale:>10,.2f}" + f"{crossing[name]:>15.0%}" * several)
        for name, value in sent.items()
    ]
    titles = f"{unit:>10}" + f"{'between nodes':>15}" * several
    return [
        ("sent per step", titles),
        *rows,
        ("bubble", f"{plan.bubble:>10.1%}  of the schedule, if all stages were alike"),
    ]


def _time_rows(plan: Plan) -> list[tuple[str, str]]:
    """Return the seconds of a step with what they are spent on, and the rates that follow."""
    time = plan.time
    if time is None:
        source = plan.hardware.source
        unknown = [("step", f"{'unknown':>10}  {_why_unknown(plan)}")]
        return [*unknown, ("  source", source)] if source else unknown
    rows = [("step", f"{'seconds':>10}{'share':>9}")]
    spent = sorted(time.causes.items(), key=lambda each: -each[1])
    rows += [
        (f"  {cause.value}", f"{seconds:>10,.4g}{seconds / time.seconds:>9.1%}")
        for cause, seconds in spent
        if seconds >= SMALL_SHARE * time.seconds
    ]
    rows.append(("  all", f"{time.seconds:>10,.4g}{'':>9}  {time.source}"))
    causal, square = (plan.mfu(convention) for convention in FlopsConvention)
    mfu = "" if causal is None or square is None else f", MFU {causal:.1%} causal, {square:.1%} full square"
    rows.append(("tokens per second", f"{time.tokens_per_second_per_gpu:,.0f} per rank{mfu}"))
    hours, days = time.gpu_hours_per_trillion_tokens, time.days_per_trillion_tokens
    rows.append(("a trillion tokens", f"{hours:,.0f} GPU hours, {days:,.1f} days on {time.ranks:,} ranks"))
    return rows


def _why_unknown(plan: Plan) -> str:
    """Return why a plan has no time, with what gives it one."""
    if plan.shape.cpu_offload:
        return "the host's optimizer has no assumed speed: parallel.fsdp.cpu_offload=false has one"
    measured = calibrate_command(plan.ranks_on_node if plan.hardware.name == CPU else 0)
    return f"hardware={plan.hardware.name} tells no peaks or links: {measured}"


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
    rows += [(f"  no {name}", reason) for name, reason in costs.upkeep.never().items()]
    if sample.share is not None and sample.seconds > costs.upkeep.generate_seconds:
        rows.append(("  cut off after", f"{costs.upkeep.generate_seconds:>10,.2f}"))
    rows.append(("  KV cache, MiB", f"{sample.cache / 2**20:>10,.2f}"))
    return rows


def _memory_rows(plan: Plan) -> list[tuple[str, str]]:
    parts = {name.replace("_", " "): value for name, value in vars(plan.memory).items()}
    on_host, pinned = parts.pop("offloaded"), parts.pop("pinned")
    # Gradients that are not there yet at the fullest moment count less: the rows sum to the total.
    if late := parts.pop("late gradients"):
        parts["gradients to come"] = -late
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


def _verdict_rows(plan: Plan, fix: str) -> list[tuple[str, str]]:
    if plan.fits is None:
        return [("verdict", "unknown: hardware.memory_bytes is not known")]
    if plan.fits:
        return [("verdict", "fits")]
    verdict = ("verdict", f"does not fit: {describe_need(plan)}")
    return [verdict, ("nearest fix", fix)] if fix else [verdict]
