"""How many ranks each axis has: as typed, and resolved (docs/parallelism.md).

ParallelDims that fit a world and a model, from those that are typed.

What `auto` stands for, one axis after the other, each in what the typed degrees leave of the world:
- pp: the fewest stages that leave at most 256 ranks to a stage; FSDP's exchanges grow slow beyond.
- tp: as many as divide heads, vocabulary and dense width, at most the 8 GPUs of a node.
- cp: the fewest, by powers of two, that leave a rank at most 8,192 tokens of a row.
- dp_shard (null too): all that is left; where it is typed, dp_replicate takes that.
- ep: as many as divide the ranks of a stage and the experts.


The laws that bind degrees, model, schedule and batch (docs/parallelism.md).

Plain integers: a layout is refused here before any process starts, in a line or two that name the key,
the numbers and the nearest values that work.
"""

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace

from dsv3.config.model import ModelConfig
from dsv3.config.parallel import KEY, DegreesConfig, ParallelConfig, PipelineConfig
from dsv3.errors import UserError, join, nearest_multiples, nearest_of
from dsv3.planning.pipeline_stages import check_microbatches, reshard_after_forward, split_layers, stage_count


@dataclass(frozen=True)
class ParallelDims:
    """Resolved degrees; experts borrow a pipeline stage's dense ranks, so `ep` is no factor of the world."""

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
        """Whether no rank has whole rows, whole heads and all layers."""
        return self.pp * self.cp * self.tp > 1

    @property
    def data_parallel(self) -> int:
        """Ranks that read different sequences."""
        return self.dp_replicate * self.dp_shard

    @property
    def fsdp_size(self) -> int:
        """Ranks that a tensor-parallel part is sharded over."""
        return self.dp_shard * self.cp

    @property
    def replicated_fsdp_size(self) -> int:
        """Ranks that parameters which every rank uses whole are sharded over; ep divides them."""
        return self.dp_shard * self.cp * self.tp

    @property
    def efsdp_size(self) -> int:
        """Ranks one expert-parallel rank's experts are sharded over: what ep leaves of its ranks."""
        return self.replicated_fsdp_size // self.ep

    def to_json(self) -> dict[str, int]:
        """The degrees by name."""
        return asdict(self)


STAGE_RANKS = 256

NODE_RANKS = 8

ROW_TOKENS = 8192


def fill(config: DegreesConfig, world_size: int, model: ModelConfig, sequence_length: int) -> ParallelDims:
    """ParallelDims whose product is `world_size`; `sequence_length` in tokens.

    Raises UserError where there are none.
    """
    degrees = ParallelDims(**config.typed)
    if world_size % degrees.world_size:
        raise UserError(_product_message(config, degrees, world_size))
    for axis, choose in (("pp", _pp), ("tp", _tp), ("cp", _cp)):
        if config.is_auto(axis):
            free = world_size // degrees.world_size
            degrees = replace(degrees, **{axis: choose(free, degrees, model, sequence_length)})
    free = world_size // degrees.world_size
    if config.is_auto("dp_shard"):
        degrees = replace(degrees, dp_shard=free)
    elif config.is_auto("dp_replicate"):
        degrees = replace(degrees, dp_replicate=free)
    elif free > 1:
        raise UserError(_product_message(config, degrees, world_size))
    if config.is_auto("ep"):
        degrees = replace(degrees, ep=max(expert_degrees(degrees, model), default=1))
    return degrees


def expert_degrees(degrees: ParallelDims, model: ModelConfig) -> list[int]:
    """The values of ep that the ranks of a stage and the experts can have, in order."""
    both = math.gcd(degrees.replicated_fsdp_size, model.moe.num_experts)
    return [ep for ep in _divisors(both) if shards_experts_evenly(replace(degrees, ep=ep), model)]


def shards_experts_evenly(degrees: ParallelDims, model: ModelConfig) -> bool:
    """Whether FSDP can cut an expert-parallel rank's experts: one by one, or each in equal runs of rows."""
    shards, moe = degrees.efsdp_size, model.moe
    if moe.num_experts // degrees.ep >= shards:
        return True
    return (2 * moe.hidden_dim) % shards == 0 and model.dim % shards == 0


def tensor_degrees(model: ModelConfig) -> list[int]:
    """The values of tp that the model's widths can have, in order."""
    dense = model.dense_hidden_dim if model.num_dense_layers else 0
    return list(_divisors(math.gcd(model.attention.heads, model.vocab_size, dense)))


def _pp(free: int, degrees: ParallelDims, model: ModelConfig, sequence_length: int) -> int:
    small = [n for n in _divisors(free) if degrees.world_size * (free // n) <= STAGE_RANKS]
    return next((n for n in small if n <= model.num_layers), 1)


def _tp(free: int, degrees: ParallelDims, model: ModelConfig, sequence_length: int) -> int:
    right = set(tensor_degrees(model)) & set(_divisors(free))
    return max(tp for tp in right if tp <= NODE_RANKS and sequence_length % (degrees.cp * tp) == 0)


def _cp(free: int, degrees: ParallelDims, model: ModelConfig, sequence_length: int) -> int:
    right = [1]
    while right[-1] * ROW_TOKENS < sequence_length:
        cp = 2 * right[-1]
        if free % cp or sequence_length % math.lcm(2 * cp, cp * degrees.tp):
            break
        right.append(cp)
    return right[-1]


def _divisors(number: int) -> Iterator[int]:
    return (n for n in range(1, number + 1) if number % n == 0)


def _product_message(config: DegreesConfig, degrees: ParallelDims, world_size: int) -> str:
    """Which degree to change, or which world to take, when the product law is broken."""
    shard_given = not config.is_auto("dp_shard")
    rest = degrees.world_size // degrees.dp_shard
    axes = ["pp", "dp_replicate", *(["dp_shard"] if shard_given else []), "cp", "tp"]
    product = " x ".join(f"{axis}={getattr(degrees, axis)}" for axis in axes)
    if not shard_given:
        near = join(nearest_multiples(rest, world_size))
        told = f"{KEY}: {product} leaves no whole dp_shard of a world of {world_size} ranks"
        return f"{told}\nnearest worlds (launch.nproc x launch.nnodes) that work: {near}"
    told = f"{KEY}: {product} is {degrees.world_size} ranks, but the world has {world_size}"
    fix = f"a world (launch.nproc x launch.nnodes) of {degrees.world_size} works"
    if world_size % rest == 0:
        fix = f"{KEY}.dp_shard={world_size // rest} works (null fills it in), or {fix}"
    return f"{told}\n{fix}"


_WRAPPERS = {
    "pp": ("pipeline", "pp or full"),
    "cp": ("context", "cp or full"),
    "tp": ("tensor", "tp_ep or full"),
    "ep": ("expert", "tp_ep or full"),
}
"""The wrapper that carries an axis out, and presets that have it."""


def resolve(
    parallel: ParallelConfig, world_size: int, model: ModelConfig, sequence_length: int
) -> ParallelDims:
    """The degrees on `world_size` ranks; UserError where they break a law, those of the batch left out."""
    degrees = fill(parallel.degrees, world_size, model, sequence_length)
    check_model(degrees, model)
    check_stages(parallel, degrees, model)
    return degrees


def check_model(degrees: ParallelDims, model: ModelConfig) -> None:
    """Raise UserError where heads, vocabulary, dense width or experts do not divide as `degrees` ask."""
    heads, vocab, experts = model.attention.heads, model.vocab_size, model.moe.num_experts
    dense = model.dense_hidden_dim if model.num_dense_layers else 0
    # What is suggested passes the other laws on the same axis too.
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
            f"model.dim={model.dim}\n{_near(nearest_of(works, degrees.ep))}; or raise dp_replicate"
        )


def check_stages(parallel: ParallelConfig, degrees: ParallelDims, model: ModelConfig) -> None:
    """Raise UserError where the layers cannot be cut into stages as pipeline and schedule ask."""
    reshard_after_forward(parallel, degrees.pp)
    if degrees.pp > model.num_layers:
        raise UserError(
            f"{KEY}.pp={degrees.pp} has more stages than model.num_layers={model.num_layers}: "
            f"at most {model.num_layers}"
        )
    if degrees.pp > 1:
        pipeline = parallel.pipeline or PipelineConfig()
        split_layers(model, stage_count(parallel, degrees.pp), pipeline.split)


def check_wrapped(parallel: ParallelConfig, degrees: ParallelDims) -> None:
    """Raise UserError for a degree that nothing in this config would carry out."""
    for axis, (wrapper, presets) in _WRAPPERS.items():
        degree = getattr(degrees, axis)
        if degree > 1 and getattr(parallel, wrapper) is None:
            raise UserError(
                f"{KEY}.{axis}={degree} needs parallel.{wrapper}, which is null here: "
                f"take parallel={presets}, or any preset but none"
            )
    if degrees.world_size > 1 and parallel.fsdp is None:
        ranks = f"{degrees.data_parallel} data-parallel ranks of {degrees.world_size}"
        raise UserError(f"{KEY}: {ranks} need parallel.fsdp, which is null here: take parallel=fsdp or hsdp")


def check_sequence(degrees: ParallelDims, sequence_length: int) -> None:
    """Raise UserError where a row of `sequence_length` tokens cannot be cut as `degrees` ask."""
    cp, tp = degrees.cp, degrees.tp
    zigzag = 2 * cp if cp > 1 else 1
    works = math.lcm(zigzag, cp * tp)
    _require_multiple("train.sequence_length", sequence_length, zigzag, f"2 x {KEY}.cp={cp}", works)
    _require_multiple("train.sequence_length", sequence_length, cp * tp, f"cp={cp} x {KEY}.tp={tp}", works)


def check_batch(
    degrees: ParallelDims, sequence_length: int, global_batch_size: int, microbatch_size: int
) -> None:
    """Raise UserError where a sequence or the global batch cannot be cut as `degrees` ask."""
    check_sequence(degrees, sequence_length)
    unit = microbatch_size * degrees.data_parallel
    factors = (
        f"train.microbatch_size={microbatch_size} x dp_replicate={degrees.dp_replicate} "
        f"x dp_shard={degrees.dp_shard}"
    )
    _require_multiple("train.global_batch_size", global_batch_size, unit, factors, unit)


def check_schedule(
    parallel: ParallelConfig, degrees: ParallelDims, global_batch_size: int, microbatch_size: int
) -> None:
    """Raise UserError where the pipeline's schedule cannot run the microbatches of a step."""
    if degrees.pp > 1:
        unit, stages = microbatch_size * degrees.data_parallel, stage_count(parallel, degrees.pp)
        count = global_batch_size // unit
        check_microbatches(parallel.schedule, degrees.pp, stages // degrees.pp, count, sequences=unit)


def _require_divides(axis: str, degree: int, of: str, number: int, works: list[int]) -> None:
    if number % degree:
        near = _near(nearest_of(works, degree))
        raise UserError(f"{KEY}.{axis}={degree} does not divide {of}={number}; {near}")


def _require_multiple(key: str, value: int, unit: int, factors: str, works: int) -> None:
    if value % unit:
        near = _near(nearest_multiples(works, value))
        raise UserError(f"{key}={value} is not a multiple of {unit} ({factors}); {near}")


def _near(numbers: list[int]) -> str:
    return f"nearest that work: {join(numbers)}" if numbers else "no value works"
