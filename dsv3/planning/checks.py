"""What parallel.expert.backend=deepep needs, asked before any process starts; imports no torch.

The numbers are those of DeepEP 1.2.1: groups for which it has a tuned config, and nodes of 8 GPUs.


What precision.fp8 needs, asked before any process starts; imports no torch.

Whether a model can be held at all: what evaluation and generation need at least.
"""

import importlib.util

from dsv3.config.hardware import HardwareConfig
from dsv3.config.model import ModelConfig
from dsv3.config.parallel import KEY, ExchangeBackend
from dsv3.config.precision import ComputeType, FP8Engine, Granularity
from dsv3.config.root import Config
from dsv3.errors import UserError, join, nearest_of
from dsv3.planning import parameters
from dsv3.planning.layout import ParallelDims, expert_degrees
from dsv3.planning.plan import Plan
from dsv3.planning.sharding import BLOCK

SIZES = (2, 4, 8, 16, 24, 32, 64, 128, 144, 160)
"""Ranks that one exchange can have."""

NODE = 8
"""Ranks of a node where an exchange spans several."""

_NAME = "parallel.expert.backend=deepep"

_ELSE = "take parallel.expert.backend=all_to_all"


def check_backend(config: Config, plan: Plan) -> None:
    """Raise UserError where DeepEP is chosen and cannot carry what this job sends, or is not here."""
    expert, degrees = config.parallel.expert, plan.degrees
    if degrees.ep == 1 or expert is None or expert.backend is not ExchangeBackend.deepep:
        return
    if plan.hardware.name == "cpu":
        raise UserError(f"{_NAME} needs CUDA GPUs, and hardware.name=cpu here: {_ELSE}")
    compute = config.precision.compute
    if compute is not ComputeType.bf16:
        raise UserError(
            f"{_NAME} carries bf16 rows, and precision.compute={compute.name} here: take precision=bf16, "
            f"or {_ELSE}"
        )
    if config.precision.fp8 is not None and config.precision.fp8.dispatch:
        _check_tiles(plan.model.dim)
    _check_size(plan)
    _check_nodes(degrees.ep, plan.shape.ranks_per_node)
    # A plan is made anywhere; a job that Slurm will start may find the package there.
    if config.task.uses_model and not config.launch.submits and importlib.util.find_spec("deep_ep") is None:
        raise UserError(missing("no module of this name here"))


def missing(why: str) -> str:
    """The message for a package that cannot be imported."""
    return (
        f"{_NAME} needs the package deep_ep (1.2.1, github.com/deepseek-ai/DeepEP): {why}\n"
        f"install it into this environment, or {_ELSE}"
    )


def _check_tiles(dim: int) -> None:
    if dim % BLOCK:
        works = join(sorted({max(BLOCK, dim // BLOCK * BLOCK), (dim // BLOCK + 1) * BLOCK}))
        raise UserError(
            f"{_NAME} carries FP8 rows in whole tiles of {BLOCK}, and model.dim={dim} here: nearest that "
            f"work: {works}; or take precision.fp8.dispatch=false, or {_ELSE}"
        )


def _check_size(plan: Plan) -> None:
    ep = plan.degrees.ep
    if ep not in SIZES:
        works = nearest_of(set(expert_degrees(plan.degrees, plan.model)) & set(SIZES), ep)
        near = f"nearest that work: {join(works)}; or {_ELSE}" if works else f"no value works: {_ELSE}"
        raise UserError(f"{KEY}.ep={ep} is no size that {_NAME} has; {near}")


def _check_nodes(ep: int, ranks_per_node: int | None) -> None:
    """One exchange stays within a node, or takes whole nodes of 8."""
    if ranks_per_node is None or (ranks_per_node == NODE if ep > NODE else ranks_per_node % ep == 0):
        return
    needs = f"nodes of {NODE} ranks" if ep > NODE else f"nodes of a multiple of {ep} ranks"
    raise UserError(
        f"{_NAME} with {KEY}.ep={ep} needs {needs}, and a node has {ranks_per_node} here: {_ELSE}"
    )


HOPPER = ("h100", "h200", "h800")
"""Hardware that has block-wise scales in its tensor cores, as cuBLAS uses them."""

_OTHERWISE = "take precision=bf16, or precision.fp8.engine=emulated, which computes the same and is slow"


def check_fp8(config: Config, plan: Plan) -> None:
    """Raise UserError where the hardware of `plan` has no engine, or settings exclude each other."""
    fp8, on = config.precision.fp8, plan.hardware.name
    if fp8 is None:
        return
    fast = fp8.engine is FP8Engine.scaled_mm or (fp8.engine is FP8Engine.auto and on != "cpu")
    if fast and on not in HOPPER:
        raise UserError(
            f"precision.fp8.engine={fp8.engine.name} needs a Hopper GPU ({', '.join(HOPPER)}), and "
            f"hardware.name={on} here: {_OTHERWISE}"
        )
    by_tensor = "precision.fp8.granularity=tensor"
    if fp8.granularity is Granularity.tensor:
        if fast:
            raise UserError(f"{by_tensor} is emulated only, to show what it does: {_OTHERWISE}")
        for name in ("dispatch", "gather"):
            if getattr(fp8, name):
                raise UserError(
                    f"precision.fp8.{name}=true quantises in tiles, and {by_tensor} here: take one of the two"
                )
    sharding = config.parallel.fsdp
    if fp8.gather and sharding is not None and sharding.cpu_offload:
        raise UserError(
            "precision.fp8.gather=true quantises shards on the device, and parallel.fsdp.cpu_offload=true "
            "keeps them on the host: take one of the two"
        )


# Parameters are fp32 whatever the precision; they are cast where they are used.
BYTES = 4

GIB = 2**30


def require_room(model: ModelConfig, degrees: ParallelDims, hardware: HardwareConfig) -> None:
    """UserError where a rank's share of the weights alone is more than its memory.

    A lower bound: it is even over all ranks but replicas, and leaves activations and caches out.
    """
    ranks = degrees.world_size // degrees.dp_replicate
    count, room = parameters.total(model), hardware.memory_bytes
    if room is None or count * BYTES <= ranks * room:
        return
    least = -(-count * BYTES // room)
    raise UserError(
        f"{count:,} parameters on {degrees.world_size:,} ranks of hardware={hardware.name} do not fit: the "
        f"weights alone take {count * BYTES / ranks / GIB:,.2f} GiB of a rank, which has {room / GIB:,.2f}\n"
        f"parallel=fsdp with {least:,} or more ranks shares them out; is it the right model=?"
    )
