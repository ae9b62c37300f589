"""Degrees that fit a world and a model, from those that are typed.

What `auto` stands for, one axis after the other, each in what the typed degrees leave of the world:
- pp: the fewest stages that leave at most 256 ranks to a stage; FSDP's exchanges grow slow beyond.
- tp: as many as divide heads, vocabulary and dense width, at most the 8 GPUs of a node.
- cp: the fewest, by powers of two, that leave a rank at most 8,192 tokens of a row.
- dp_shard (null too): all that is left; where it is typed, dp_replicate takes that.
- ep: as many as divide the ranks of a stage and the experts.
"""

import math
from collections.abc import Iterator
from dataclasses import replace

from dsv3.model.config import ModelConfig
from dsv3.parallel.degrees import KEY, Degrees, DegreesConfig
from dsv3.parallel.nearest import join, nearest_multiples
from dsv3.runtime.errors import UserError

STAGE_RANKS = 256
NODE_RANKS = 8
ROW_TOKENS = 8192


def fill(config: DegreesConfig, world_size: int, model: ModelConfig, sequence_length: int) -> Degrees:
    """Degrees whose product is `world_size`; `sequence_length` in tokens.

    Raises UserError where there are none.
    """
    degrees = Degrees(**config.typed)
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


def expert_degrees(degrees: Degrees, model: ModelConfig) -> list[int]:
    """The values of ep that the ranks of a stage and the experts can have, in order."""
    both = math.gcd(degrees.whole_shards, model.moe.num_experts)
    return [ep for ep in _divisors(both) if shards_experts_evenly(replace(degrees, ep=ep), model)]


def shards_experts_evenly(degrees: Degrees, model: ModelConfig) -> bool:
    """Whether FSDP can cut an expert-parallel rank's experts: one by one, or each in equal runs of rows."""
    shards, moe = degrees.expert_shards, model.moe
    if moe.num_experts // degrees.ep >= shards:
        return True
    return (2 * moe.hidden_dim) % shards == 0 and model.dim % shards == 0


def tensor_degrees(model: ModelConfig) -> list[int]:
    """The values of tp that the model's widths can have, in order."""
    dense = model.dense_hidden_dim if model.num_dense_layers else 0
    return list(_divisors(math.gcd(model.attention.heads, model.vocab_size, dense)))


def _pp(free: int, degrees: Degrees, model: ModelConfig, sequence_length: int) -> int:
    small = [n for n in _divisors(free) if degrees.world_size * (free // n) <= STAGE_RANKS]
    return next((n for n in small if n <= model.num_layers), 1)


def _tp(free: int, degrees: Degrees, model: ModelConfig, sequence_length: int) -> int:
    right = set(tensor_degrees(model)) & set(_divisors(free))
    return max(tp for tp in right if tp <= NODE_RANKS and sequence_length % (degrees.cp * tp) == 0)


def _cp(free: int, degrees: Degrees, model: ModelConfig, sequence_length: int) -> int:
    right = [1]
    while right[-1] * ROW_TOKENS < sequence_length:
        cp = 2 * right[-1]
        if free % cp or sequence_length % math.lcm(2 * cp, cp * degrees.tp):
            break
        right.append(cp)
    return right[-1]


def _divisors(number: int) -> Iterator[int]:
    return (n for n in range(1, number + 1) if number % n == 0)


def _product_message(config: DegreesConfig, degrees: Degrees, world_size: int) -> str:
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
