"""Whether a plan fits, and the nearest change that would make it fit."""

from dataclasses import replace

from dsv3.parallel.config import Recomputed
from dsv3.parallel.degrees import Degrees
from dsv3.planning import parameters
from dsv3.planning.memory import rank_memory
from dsv3.planning.plan import Plan
from dsv3.planning.shape import StepShape
from dsv3.runtime.errors import UserError

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


def smallest_dp_shard(plan: Plan) -> Degrees | None:
    """Degrees with the smallest power-of-two multiple of dp_shard, the world growing with it, that fit.

    None where no number of ranks does, as when activations alone are too large.
    """
    degrees = plan.degrees
    while degrees.dp_shard < MOST_SHARDS:
        degrees = replace(degrees, dp_shard=2 * degrees.dp_shard)
        if _with(plan, plan.shape, degrees).fits:
            return degrees
    return None


def _with(plan: Plan, shape: StepShape, degrees: Degrees) -> Plan:
    """The same plan on other degrees or of another shape; what is sent is left as it was."""
    memory = rank_memory(plan.model, degrees, shape)
    return replace(plan, shape=shape, degrees=degrees, memory=memory)


def shards_that_fit(degrees: Degrees) -> str:
    """That these degrees fit, and the ranks that they take."""
    world = f"launch.nproc x launch.nnodes = {degrees.world_size:,} ranks"
    return f"parallel.degrees.dp_shard={degrees.dp_shard} fits, with {world}"
