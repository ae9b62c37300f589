"""The laws that bind degrees, model, schedule and batch (docs/parallelism.md).

Plain integers: a layout is refused here before any process starts, in a line or two that name the key,
the numbers and the nearest values that work.
"""

import math

from dsv3.model.config import ModelConfig
from dsv3.parallel.config import ParallelConfig, PipelineConfig
from dsv3.parallel.degrees import KEY, Degrees
from dsv3.parallel.filling import expert_degrees, fill, shards_experts_evenly, tensor_degrees
from dsv3.parallel.nearest import join, nearest_multiples, nearest_of
from dsv3.parallel.stages import check_microbatches, reshard_after_forward, split_layers, stage_count
from dsv3.runtime.errors import UserError

_WRAPPERS = {
    "pp": ("pipeline", "pp or full"),
    "cp": ("context", "cp or full"),
    "tp": ("tensor", "tp_ep or full"),
    "ep": ("expert", "tp_ep or full"),
}
"""The wrapper that carries an axis out, and presets that have it."""


def resolve(parallel: ParallelConfig, world_size: int, model: ModelConfig, sequence_length: int) -> Degrees:
    """The degrees on `world_size` ranks; UserError where they break a law, those of the batch left out."""
    degrees = fill(parallel.degrees, world_size, model, sequence_length)
    check_model(degrees, model)
    check_stages(parallel, degrees, model)
    return degrees


def check_model(degrees: Degrees, model: ModelConfig) -> None:
    """Raise UserError where heads, vocabulary, dense width or experts do not divide as `degrees` ask."""
    heads, vocab, experts = model.attention.heads, model.vocab_size, model.moe.num_experts
    dense = model.dense_hidden_dim if model.num_dense_layers else 0
    # What is suggested passes the other laws on the same axis too.
    works = tensor_degrees(model)
    _require_divides("tp", degrees.tp, "model.attention.heads", heads, works)
    _require_divides("tp", degrees.tp, "model.vocab_size", vocab, works)
    _require_divides("tp", degrees.tp, "model.dense_hidden_dim", dense, works)
    works = expert_degrees(degrees, model)
    _require_divides("ep", degrees.ep, "dp_shard x cp x tp", degrees.whole_shards, works)
    _require_divides("ep", degrees.ep, "model.moe.num_experts", experts, works)
    if not shards_experts_evenly(degrees, model):
        raise UserError(
            f"{KEY}.ep={degrees.ep} cuts {experts // degrees.ep} experts into {degrees.expert_shards} "
            f"shards, which do not divide 2 x model.moe.hidden_dim={2 * model.moe.hidden_dim} and "
            f"model.dim={model.dim}\n{_near(nearest_of(works, degrees.ep))}; or raise dp_replicate"
        )


def check_stages(parallel: ParallelConfig, degrees: Degrees, model: ModelConfig) -> None:
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


def check_wrapped(parallel: ParallelConfig, degrees: Degrees) -> None:
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


def check_sequence(degrees: Degrees, sequence_length: int) -> None:
    """Raise UserError where a row of `sequence_length` tokens cannot be cut as `degrees` ask."""
    cp, tp = degrees.cp, degrees.tp
    zigzag = 2 * cp if cp > 1 else 1
    works = math.lcm(zigzag, cp * tp)
    _require_multiple("train.sequence_length", sequence_length, zigzag, f"2 x {KEY}.cp={cp}", works)
    _require_multiple("train.sequence_length", sequence_length, cp * tp, f"cp={cp} x {KEY}.tp={tp}", works)


def check_batch(degrees: Degrees, sequence_length: int, global_batch_size: int, microbatch_size: int) -> None:
    """Raise UserError where a sequence or the global batch cannot be cut as `degrees` ask."""
    check_sequence(degrees, sequence_length)
    unit = microbatch_size * degrees.data_parallel
    factors = (
        f"train.microbatch_size={microbatch_size} x dp_replicate={degrees.dp_replicate} "
        f"x dp_shard={degrees.dp_shard}"
    )
    _require_multiple("train.global_batch_size", global_batch_size, unit, factors, unit)


def check_schedule(
    parallel: ParallelConfig, degrees: Degrees, global_batch_size: int, microbatch_size: int
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
