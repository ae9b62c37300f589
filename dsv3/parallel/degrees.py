"""How many ranks each axis has, and the laws that bind them (docs/parallelism.md).

Plain integers: a layout is refused here before any process starts.
"""

import math
from dataclasses import asdict, dataclass, fields

from dsv3.model.config import ModelConfig
from dsv3.runtime.errors import UserError, require_positive

KEY = "parallel.degrees"


@dataclass
class DegreesConfig:
    """Ranks an axis; null is filled in: `dp_shard` takes what is left of the world, the others are 1."""

    pp: int | None = None
    dp_replicate: int | None = None
    dp_shard: int | None = None
    cp: int | None = None
    tp: int | None = None
    ep: int | None = None

    def validate(self) -> None:
        """Refuse degrees below 1."""
        require_positive(self, *(f.name for f in fields(self)))


@dataclass(frozen=True)
class Degrees:
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
    def data_parallel(self) -> int:
        """Ranks that read different sequences."""
        return self.dp_replicate * self.dp_shard

    @property
    def dense_shards(self) -> int:
        """Ranks that a tensor-parallel part is sharded over."""
        return self.dp_shard * self.cp

    @property
    def whole_shards(self) -> int:
        """Ranks that parameters which every rank uses whole are sharded over."""
        return self.dp_shard * self.cp * self.tp

    @property
    def expert_shards(self) -> int:
        """Ranks one expert-parallel rank's experts are sharded over: what ep leaves of its ranks."""
        return self.dp_shard * self.cp * self.tp // self.ep

    def to_json(self) -> dict[str, int]:
        """The degrees by name."""
        return asdict(self)


def resolve(
    config: DegreesConfig,
    world_size: int,
    model: ModelConfig,
    sequence_length: int,
    global_batch_size: int,
    microbatch_size: int,
) -> Degrees:
    """Fill in `config` for `world_size` ranks and check every law; lengths in tokens, batches in sequences.

    Raises UserError for the first law that is broken.
    """
    degrees = fill(config, world_size)
    check_model(degrees, model)
    check_batch(degrees, sequence_length, global_batch_size, microbatch_size)
    return degrees


def fill(config: DegreesConfig, world_size: int) -> Degrees:
    """Degrees whose product is `world_size`; raises UserError where there are none."""
    given = {key: value for key, value in vars(config).items() if value is not None}
    degrees = Degrees(**given)
    if "dp_shard" not in given and world_size % degrees.world_size == 0:
        degrees = Degrees(**given, dp_shard=world_size // degrees.world_size)
    if degrees.world_size != world_size:
        raise UserError(_product_message(degrees, "dp_shard" in given, world_size))
    return degrees


def check_model(degrees: Degrees, model: ModelConfig) -> None:
    """Raise UserError where heads, vocabulary, experts or layers do not divide as `degrees` ask."""
    heads, vocab, experts = model.attention.heads, model.vocab_size, model.moe.num_experts
    # What is suggested must pass the other law on the same axis too, hence the gcd.
    tp_works, ranks = math.gcd(heads, vocab), degrees.dp_shard * degrees.cp * degrees.tp
    ep_works = math.gcd(ranks, experts)
    _require_divides("tp", degrees.tp, "model.attention.heads", heads, tp_works)
    _require_divides("tp", degrees.tp, "model.vocab_size", vocab, tp_works)
    _require_divides("ep", degrees.ep, "dp_shard x cp x tp", ranks, ep_works)
    _require_divides("ep", degrees.ep, "model.moe.num_experts", experts, ep_works)
    if degrees.pp > model.num_layers:
        raise UserError(
            f"{KEY}.pp={degrees.pp} has more stages than model.num_layers={model.num_layers}: "
            f"at most {model.num_layers}"
        )


def check_batch(degrees: Degrees, sequence_length: int, global_batch_size: int, microbatch_size: int) -> None:
    """Raise UserError where a sequence or the global batch cannot be cut as `degrees` ask."""
    cp, tp = degrees.cp, degrees.tp
    zigzag = 2 * cp if cp > 1 else 1
    works = math.lcm(zigzag, cp * tp)
    _require_multiple("train.sequence_length", sequence_length, zigzag, f"2 x {KEY}.cp={cp}", works)
    _require_multiple("train.sequence_length", sequence_length, cp * tp, f"cp={cp} x {KEY}.tp={tp}", works)
    unit = microbatch_size * degrees.data_parallel
    factors = (
        f"train.microbatch_size={microbatch_size} x dp_replicate={degrees.dp_replicate} "
        f"x dp_shard={degrees.dp_shard}"
    )
    _require_multiple("train.global_batch_size", global_batch_size, unit, factors, unit)


def _require_divides(axis: str, degree: int, of: str, number: int, works: int) -> None:
    if number % degree:
        near = _join(nearest_divisors(works, degree))
        raise UserError(f"{KEY}.{axis}={degree} does not divide {of}={number}; nearest that work: {near}")


def _require_multiple(key: str, value: int, unit: int, factors: str, works: int) -> None:
    if value % unit:
        near = _join(nearest_multiples(works, value))
        raise UserError(f"{key}={value} is not a multiple of {unit} ({factors}); nearest that work: {near}")


def nearest_divisors(number: int, value: int) -> list[int]:
    """The largest divisor of `number` below `value` and the smallest above it, where there are such."""
    divisors = [n for n in range(1, number + 1) if number % n == 0]
    return [n for n in divisors if n < value][-1:] + [n for n in divisors if n > value][:1]


def nearest_multiples(unit: int, value: int) -> list[int]:
    """The multiples of `unit` next to `value`, without 0."""
    below = value // unit * unit
    return [n for n in (below, below + unit) if n > 0]


def _product_message(degrees: Degrees, shard_given: bool, world_size: int) -> str:
    """Which degree to change, or which world to take, when the product law is broken."""
    rest = degrees.world_size // degrees.dp_shard
    axes = ["pp", "dp_replicate", *(["dp_shard"] if shard_given else []), "cp", "tp"]
    product = " x ".join(f"{axis}={getattr(degrees, axis)}" for axis in axes)
    if not shard_given:
        near = _join(nearest_multiples(rest, world_size))
        told = f"{KEY}: {product} leaves no whole dp_shard of a world of {world_size} ranks"
        return f"{told}\nnearest worlds (launch.nproc x launch.nnodes) that work: {near}"
    told = f"{KEY}: {product} is {degrees.world_size} ranks, but the world has {world_size}"
    fix = f"a world (launch.nproc x launch.nnodes) of {degrees.world_size} works"
    if world_size % rest == 0:
        fix = f"{KEY}.dp_shard={world_size // rest} works (null fills it in), or {fix}"
    return f"{told}\n{fix}"


def _join(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers))
