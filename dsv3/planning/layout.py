"""Layout: parallel degrees, auto degrees, and the constraints between degrees, model, schedule and batch.

Plain integers: a layout is refused here before any process starts, in a line or two that name the key, the
numbers and the nearest values that work (docs/parallelism.md).

Auto degrees are chosen axis by axis, each within what the typed degrees leave of the world:
- pp: the fewest stages that leave at most 256 ranks per stage; FSDP's collectives grow slow beyond.
- tp: the largest that divides heads, vocabulary and dense width, at most the 8 GPUs of a node.
- cp: the smallest power of two that leaves a rank at most 8,192 tokens of a sequence.
- dp_shard (null too): all ranks that are left; if it is typed, dp_replicate takes them.
- ep: the largest that divides the ranks of a stage and the experts.
"""

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from itertools import islice

from dsv3.config.model import ModelConfig
from dsv3.config.parallel import KEY, WORLD_AXES, ParallelConfig, PipelineConfig
from dsv3.errors import UserError, closest_multiples, closest_values, comma_separated
from dsv3.planning.batch_schedule import BatchSchedule, check_ramp
from dsv3.planning.pipeline_stages import (
    check_microbatches,
    reshard_after_forward,
    split_layers,
    stage_count,
    supports_microbatches,
)


@dataclass(frozen=True)
class ParallelDims:
    """Resolved degrees; experts borrow the dense ranks of a stage, so `ep` is no factor of the world size."""

    pp: int = 1
    dp_replicate: int = 1
    dp_shard: int = 1
    cp: int = 1
    tp: int = 1
    ep: int = 1

    @property
    def world_size(self) -> int:
        """Ranks of all axes together."""
        return self.pp * self.dp_replicate * self.dp_shard * self.cp * self.tp

    @property
    def splits_rows(self) -> bool:
        """True if no rank has whole sequences, all heads and all layers."""
        return self.pp * self.cp * self.tp > 1

    @property
    def data_parallel(self) -> int:
        """Ranks that read different sequences."""
        return self.dp_replicate * self.dp_shard

    @property
    def fsdp_size(self) -> int:
        """Ranks over which FSDP shards a weight that tp splits."""
        return self.dp_shard * self.cp

    @property
    def replicated_fsdp_size(self) -> int:
        """Ranks over which FSDP shards a weight that tp would replicate; ep divides their number."""
        return self.dp_shard * self.cp * self.tp

    @property
    def efsdp_size(self) -> int:
        """Ranks over which FSDP shards the experts of one expert-parallel rank: those that ep leaves."""
        return self.replicated_fsdp_size // self.ep

    def to_json(self) -> dict[str, int]:
        """Return the degrees by name."""
        return asdict(self)


STAGE_RANKS = 256
"""Most ranks of a stage with pp=auto."""

NODE_RANKS = 8
"""Largest tp with tp=auto."""

SEQUENCE_TOKENS = 8192
"""Most tokens of a sequence per rank with cp=auto."""


def fill_auto_degrees(
    parallel: ParallelConfig, world_size: int, model: ModelConfig, sequence_length: int
) -> ParallelDims:
    """Return degrees whose product is `world_size`, with `auto` replaced; `sequence_length` in tokens.

    Raises UserError if no degrees fit.
    """
    config = parallel.degrees
    degrees = ParallelDims(**config.typed)
    if world_size % degrees.world_size:
        raise UserError(_product_message(parallel, degrees, world_size, model, sequence_length))
    for axis, choose in (("pp", _auto_pp), ("tp", _auto_tp), ("cp", _auto_cp)):
        if config.is_auto(axis):
            free = world_size // degrees.world_size
            degrees = replace(degrees, **{axis: choose(free, degrees, model, sequence_length)})
    free = world_size // degrees.world_size
    if config.is_auto("dp_shard"):
        degrees = replace(degrees, dp_shard=free)
    elif config.is_auto("dp_replicate"):
        degrees = replace(degrees, dp_replicate=free)
    elif free > 1:
        raise UserError(_product_message(parallel, degrees, world_size, model, sequence_length))
    if config.is_auto("ep"):
        degrees = replace(degrees, ep=max(expert_degrees(degrees, model), default=1))
    return degrees


def expert_degrees(degrees: ParallelDims, model: ModelConfig) -> list[int]:
    """List, in order, the values of ep that divide the ranks of a stage and the experts."""
    both = math.gcd(degrees.replicated_fsdp_size, model.moe.num_experts)
    return [ep for ep in _divisors(both) if shards_experts_evenly(replace(degrees, ep=ep), model)]


def shards_experts_evenly(degrees: ParallelDims, model: ModelConfig) -> bool:
    """Return True if FSDP can shard an expert-parallel rank's experts: whole, or each by equal rows."""
    shards, moe = degrees.efsdp_size, model.moe
    if moe.num_experts // degrees.ep >= shards:
        return True
    return (2 * moe.hidden_dim) % shards == 0 and model.dim % shards == 0


def tensor_degrees(model: ModelConfig) -> list[int]:
    """List, in order, the values of tp that divide the model's widths."""
    dense = model.dense_hidden_dim if model.num_dense_layers else 0
    return list(_divisors(math.gcd(model.attention.heads, model.vocab_size, dense)))


def _auto_pp(free: int, degrees: ParallelDims, model: ModelConfig, sequence_length: int) -> int:
    enough = [n for n in _divisors(free) if degrees.world_size * (free // n) <= STAGE_RANKS]
    return next((n for n in enough if n <= model.num_layers), 1)


def _auto_tp(free: int, degrees: ParallelDims, model: ModelConfig, sequence_length: int) -> int:
    candidates = set(tensor_degrees(model)) & set(_divisors(free))
    return max(tp for tp in candidates if tp <= NODE_RANKS and sequence_length % (degrees.cp * tp) == 0)


def _auto_cp(free: int, degrees: ParallelDims, model: ModelConfig, sequence_length: int) -> int:
    cp = 1
    while cp * SEQUENCE_TOKENS < sequence_length:
        if free % (2 * cp) or sequence_length % math.lcm(4 * cp, 2 * cp * degrees.tp):
            break
        cp *= 2
    return cp


def _divisors(number: int) -> Iterator[int]:
    return (n for n in range(1, number + 1) if number % n == 0)


def _product_message(
    parallel: ParallelConfig, degrees: ParallelDims, world_size: int, model: ModelConfig, length: int
) -> str:
    """Return the error for degrees whose product is not the world size, with degrees or worlds that work.

    Each suggestion has passed the checks that it meets once it is typed.
    """

    def works(world: int, dp_shard: int | None, config: ParallelConfig = parallel) -> bool:
        changed = replace(config, degrees=replace(config.degrees, dp_shard=dp_shard))
        try:
            resolve_degrees(changed, world, model, length, wrapped=True)
        except UserError:
            return False
        return True

    config = parallel.degrees
    shard_given = not config.is_auto("dp_shard")
    rest = degrees.world_size // degrees.dp_shard
    axes = [axis for axis in WORLD_AXES if shard_given or axis != "dp_shard"]
    product = " x ".join(f"{axis}={getattr(degrees, axis)}" for axis in axes)
    if not shard_given:
        near = [n for n in _multiples_by_distance(rest, world_size) if works(n, None)][:2]
        told = f"{KEY}: {product} leaves no whole dp_shard of a world of {world_size} ranks"
        if not near:
            return f"{told}\nno world near it works: give other degrees"
        near_by = comma_separated(sorted(near))
        return f"{told}\nnearest worlds (launch.nproc x launch.nnodes) that work: {near_by}"
    told = f"{KEY}: {product} is {degrees.world_size} ranks, but the world has {world_size}"
    # The preset has every wrapper; a choice without FSDP runs on one rank alone.
    preset, sharded = "", parallel
    if parallel.fsdp is None:
        preset, sharded = "parallel=fsdp ", ParallelConfig(degrees=config, schedule=parallel.schedule)
    fixes = []
    if world_size % rest == 0 and works(world_size, world_size // rest, sharded):
        filled = "" if preset else " (null fills it in)"
        fixes.append(f"{preset}{KEY}.dp_shard={world_size // rest} works{filled}")
    if works(degrees.world_size, degrees.dp_shard):
        fixes.append(f"a world (launch.nproc x launch.nnodes) of {degrees.world_size} works")
    if not any("dp_shard" in fix for fix in fixes):
        others = (n for n in _multiples_by_distance(rest, world_size) if works(n, n // rest, sharded))
        fixes += [f"one of {n} with {preset}{KEY}.dp_shard={n // rest}" for n in islice(others, 1)]
    return f"{told}\n{', or '.join(fixes) or 'give other degrees: no dp_shard works here'}"


def _multiples_by_distance(unit: int, number: int) -> list[int]:
    """List the multiples of `unit` that are nearest to `number`, the nearest first."""
    middle = number // unit
    near = range(max(1, middle - 32), middle + 33)
    return sorted((n * unit for n in near), key=lambda multiple: (abs(multiple - number), multiple))


_WRAPPERS = {"pp": "pipeline", "cp": "context", "tp": "tensor", "ep": "expert"}
"""Per axis, the config node of its wrapper."""


def resolve_degrees(
    parallel: ParallelConfig,
    world_size: int,
    model: ModelConfig,
    sequence_length: int,
    wrapped: bool = False,
) -> ParallelDims:
    """Return the degrees on `world_size` ranks; raise UserError for a constraint of model or stages.

    `wrapped` asks for the wrapper of every degree too, as a task does that builds the model.
    """
    degrees = fill_auto_degrees(parallel, world_size, model, sequence_length)
    if wrapped:
        check_wrappers(parallel, degrees)
    check_model(degrees, model)
    check_stages(parallel, degrees, model)
    return degrees


def check_model(degrees: ParallelDims, model: ModelConfig) -> None:
    """Raise UserError if `degrees` do not divide heads, vocabulary, dense width or experts."""
    heads, vocab, experts = model.attention.heads, model.vocab_size, model.moe.num_experts
    dense = model.dense_hidden_dim if model.num_dense_layers else 0
    # The suggestions meet the other constraints on the same axis too.
    works = tensor_degrees(model)
    _require_divides("tp", degrees.tp, "model.attention.heads", heads, works)
    _require_divides("tp", degrees.tp, "model.vocab_size", vocab, works)
    _require_divides("tp", degrees.tp, "model.dense_hidden_dim", dense, works)
    works = expert_degrees(degrees, model)
    _require_divides("ep", degrees.ep, "dp_shard x cp x tp", degrees.replicated_fsdp_size, works)
    _require_divides("ep", degrees.ep, "model.moe.num_experts", experts, works)
    if not shards_experts_evenly(degrees, model):
        raise UserError(
            f"{KEY}.ep={degrees.ep} cuts {experts // degrees.ep} experts into {degrees.efsdp_size} "
            f"shards, which do not divide 2 x model.moe.hidden_dim={2 * model.moe.hidden_dim} and "
            f"model.dim={model.dim}\n{_near(closest_values(works, degrees.ep))}; or raise dp_replicate"
        )


def check_stages(parallel: ParallelConfig, degrees: ParallelDims, model: ModelConfig) -> None:
    """Raise UserError if the layers cannot be split into the stages of pipeline and schedule."""
    reshard_after_forward(parallel, degrees.pp)
    if degrees.pp > model.num_layers:
        raise UserError(
            f"{KEY}.pp={degrees.pp} has more stages than model.num_layers={model.num_layers}: "
            f"at most {model.num_layers}"
        )
    if degrees.pp > 1:
        pipeline = parallel.pipeline or PipelineConfig()
        split_layers(model, stage_count(parallel, degrees.pp), pipeline.split)


def check_wrappers(parallel: ParallelConfig, degrees: ParallelDims) -> None:
    """Raise UserError for a degree above 1 whose wrapper is null in this config."""
    # parallel=fsdp has every wrapper and sets no degree: whatever is typed beside it, it stands.
    for axis, wrapper in _WRAPPERS.items():
        degree = getattr(degrees, axis)
        if degree > 1 and getattr(parallel, wrapper) is None:
            raise UserError(
                f"{KEY}.{axis}={degree} needs parallel.{wrapper}, which is null here: "
                f"take parallel=fsdp, which has it, or leave parallel.{wrapper}=null out"
            )
    if degrees.world_size > 1 and parallel.fsdp is None:
        ranks = f"{degrees.data_parallel} data-parallel ranks of {degrees.world_size}"
        raise UserError(f"{KEY}: {ranks} need parallel.fsdp, which is null here: take parallel=fsdp")


def check_sequence(degrees: ParallelDims, sequence_length: int) -> None:
    """Raise UserError if `degrees` do not divide a sequence of `sequence_length` tokens."""
    cp, tp = degrees.cp, degrees.tp
    zigzag = 2 * cp if cp > 1 else 1
    works = math.lcm(zigzag, cp * tp)
    _require_multiple("train.sequence_length", sequence_length, zigzag, f"2 x {KEY}.cp={cp}", works)
    _require_multiple("train.sequence_length", sequence_length, cp * tp, f"cp={cp} x {KEY}.tp={tp}", works)


def check_batch(
    parallel: ParallelConfig, degrees: ParallelDims, batch: BatchSchedule, microbatch_size: int
) -> None:
    """Raise UserError if a batch size of the run does not split over `degrees`, microbatches and pipeline."""
    unit = microbatch_size * degrees.data_parallel
    factors = (
        f"train.microbatch_size={microbatch_size} x dp_replicate={degrees.dp_replicate} "
        f"x dp_shard={degrees.dp_shard}"
    )
    _require_multiple("train.global_batch_size", batch.final, unit, factors, unit)
    check_schedule(parallel, degrees, batch.final, microbatch_size)
    if degrees.pp == 1:
        check_ramp(batch, unit, factors)
        return
    schedule, per_rank = parallel.schedule, stage_count(parallel, degrees.pp) // degrees.pp

    def supports(count: int) -> bool:
        return supports_microbatches(schedule, degrees.pp, per_rank, count)

    needs = f"which parallel.schedule={schedule.name} on {degrees.pp} x {per_rank} stages cannot run"
    check_ramp(batch, unit, factors, supports, needs)


def check_schedule(
    parallel: ParallelConfig, degrees: ParallelDims, global_batch_size: int, microbatch_size: int
) -> None:
    """Raise UserError if the pipeline's schedule cannot run the microbatches of a step."""
    if degrees.pp > 1:
        unit, stages = microbatch_size * degrees.data_parallel, stage_count(parallel, degrees.pp)
        count = global_batch_size // unit
        check_microbatches(parallel.schedule, degrees.pp, stages // degrees.pp, count, sequences=unit)


def _require_divides(axis: str, degree: int, of: str, number: int, works: list[int]) -> None:
    if number % degree:
        near = _near(closest_values(works, degree))
        raise UserError(f"{KEY}.{axis}={degree} does not divide {of}={number}; {near}")


def _require_multiple(key: str, value: int, unit: int, factors: str, works: int) -> None:
    if value % unit:
        near = _near(closest_multiples(works, value))
        raise UserError(f"{key}={value} is not a multiple of {unit} ({factors}); {near}")


def _near(numbers: list[int]) -> str:
    return f"nearest that work: {comma_separated(numbers)}" if numbers else "no value works"
