"""Checks of a run before any process starts: DeepEP, FP8, and weights that fit the ranks at all; no torch.

The numbers about DeepEP are those of version 1.2.1: group sizes for which it has a tuned config, and nodes of
8 GPUs.
"""

import importlib.util

from dsv3.config.hardware import CPU, is_hopper
from dsv3.config.parallel import KEY, DispatchBackend
from dsv3.config.precision import ComputeType, FP8Engine, Granularity
from dsv3.config.root import Config
from dsv3.errors import UserError, closest_values, comma_separated
from dsv3.planning import parameters
from dsv3.planning.layout import expert_degrees
from dsv3.planning.plan import Plan
from dsv3.planning.sharding import FP8_BLOCK

DEEPEP_SIZES = (2, 4, 8, 16, 24, 32, 64, 128, 144, 160)
"""Ranks that one exchange of DeepEP can have."""

DEEPEP_NODE_RANKS = 8
"""Ranks per node if an exchange of DeepEP spans several nodes."""

_DEEPEP = "parallel.expert.backend=deepep"

_ALL_TO_ALL = "take parallel.expert.backend=all_to_all"


def check_expert_backend(config: Config, plan: Plan) -> None:
    """Raise UserError if DeepEP is configured but cannot do this job's token dispatch, or is missing."""
    expert, degrees = config.parallel.expert, plan.degrees
    ep, per_node, dim = degrees.ep, plan.shape.ranks_per_node, plan.model.dim
    if ep == 1 or expert is None or expert.backend is not DispatchBackend.deepep:
        return
    if plan.hardware.name == "cpu":
        raise UserError(f"{_DEEPEP} needs CUDA GPUs, and hardware.name=cpu here: {_ALL_TO_ALL}")
    compute = config.precision.compute
    if compute is not ComputeType.bf16:
        raise UserError(
            f"{_DEEPEP} carries bf16 rows, and precision.compute={compute.name} here: take precision=bf16, "
            f"or {_ALL_TO_ALL}"
        )
    if config.precision.fp8 is not None and config.precision.fp8.dispatch and dim % FP8_BLOCK:
        below = dim // FP8_BLOCK * FP8_BLOCK
        works = comma_separated(sorted({max(FP8_BLOCK, below), below + FP8_BLOCK}))
        raise UserError(
            f"{_DEEPEP} carries FP8 rows in whole tiles of {FP8_BLOCK}, and model.dim={dim} here: "
            f"nearest that work: {works}; or take precision.fp8.dispatch=false, or {_ALL_TO_ALL}"
        )
    if ep not in DEEPEP_SIZES:
        near = closest_values(set(expert_degrees(degrees, plan.model)) & set(DEEPEP_SIZES), ep)
        fix = f"nearest that work: {comma_separated(near)}; or" if near else "no value works:"
        raise UserError(f"{KEY}.ep={ep} is no size that {_DEEPEP} has; {fix} {_ALL_TO_ALL}")
    # One exchange stays within a node, or takes whole nodes of 8.
    spans_nodes = ep > DEEPEP_NODE_RANKS
    if per_node is not None and (per_node != DEEPEP_NODE_RANKS if spans_nodes else per_node % ep):
        needs = f"nodes of {DEEPEP_NODE_RANKS} ranks" if spans_nodes else f"nodes of a multiple of {ep} ranks"
        raise UserError(
            f"{_DEEPEP} with {KEY}.ep={ep} needs {needs}, and a node has {per_node} here: {_ALL_TO_ALL}"
        )
    # A plan is made anywhere; a job that Slurm will start may find the package there.
    if config.task.uses_model and not config.launch.submits and importlib.util.find_spec("deep_ep") is None:
        raise UserError(deepep_missing("no module of this name here"))


def deepep_missing(why: str) -> str:
    """Return the message for a deep_ep package that cannot be imported."""
    return (
        f"{_DEEPEP} needs the package deep_ep (1.2.1, github.com/deepseek-ai/DeepEP): {why}\n"
        f"install it into this environment, or {_ALL_TO_ALL}"
    )


HOPPER = ("h100", "h200", "h800")
"""The choices of `hardware` that are Hopper GPUs."""


def check_fp8(config: Config, plan: Plan) -> list[str]:
    """Return lines for the user on the FP8 engine of the plan's hardware.

    Raises:
        UserError: the hardware does not have the engine that is chosen, or FP8 settings exclude each other.
    """
    fp8, on = config.precision.fp8, plan.hardware.name
    if fp8 is None:
        return []
    otherwise = "take precision=bf16, or precision.fp8.engine=emulated, which computes the same and is slow"
    if fp8.engine is FP8Engine.scaled_mm and not is_hopper(on):
        raise UserError(
            f"precision.fp8.engine=scaled_mm needs a Hopper GPU ({', '.join(HOPPER)}), and "
            f"hardware.name={on} here: {otherwise}"
        )
    fast = fp8.engine is not FP8Engine.emulated and is_hopper(on)
    notes = []
    if fp8.engine is FP8Engine.auto and not fast and on != CPU:
        notes.append(
            f"FP8 is emulated in fp32 on {on}: PyTorch multiplies tiles and blocks on Hopper alone; the "
            "numbers are FP8's, and a step takes many times as long as with precision=bf16"
        )
    by_tensor = "precision.fp8.granularity=tensor"
    if fp8.granularity is Granularity.tensor:
        if fast:
            raise UserError(f"{by_tensor} is emulated only, to show what it does: {otherwise}")
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
    return notes


PARAMETER_BYTES = 4
"""Parameters are fp32 under every precision; they are cast where they are used."""

GIB = 2**30


def require_room(plan: Plan, tokens: int = 0, host_ranks: int | None = None) -> None:
    """Raise UserError if a rank's share of the weights, and the KV cache of `tokens`, exceed its memory.

    It is a lower bound for evaluation and generation: an even share over all ranks but replicas, without
    activations. The cache of a row is on every rank, in part under pipeline parallelism. `host_ranks`
    share the memory of a node; None where each rank has its own.
    """
    model, degrees, hardware = plan.model, plan.degrees, plan.hardware
    ranks = degrees.world_size // degrees.dp_replicate
    size, room = parameters.total(model) * PARAMETER_BYTES, hardware.memory_bytes
    cache = plan.between_steps.cache(tokens)
    if room is None or size + ranks * cache <= ranks * room:
        return
    fitting = int((room - size / ranks) // (cache / tokens)) if tokens else 0
    if fitting > 0:
        raise UserError(
            f"the KV cache of {tokens:,} tokens does not fit on hardware={hardware.name}: it takes "
            f"{cache / GIB:,.2f} GiB of a rank and the weights {size / ranks / GIB:,.2f}, of "
            f"{room / GIB:,.2f}\n"
            f"prompt and task.max_tokens together may have {fitting:,} tokens"
        )
    sharing = f"parallel=fsdp with {-(-size // room):,} or more ranks shares them out"
    if host_ranks is not None:
        host = room * host_ranks
        sharing = (
            f"more ranks here share the same {host / GIB:,.2f} GiB: parallel=fsdp on {-(-size // host):,} or "
            "more such nodes shares them out, one rank on each"
        )
    raise UserError(
        f"{parameters.total(model):,} parameters on {degrees.world_size:,} ranks of hardware={hardware.name} "
        f"do not fit: the weights alone take {size / ranks / GIB:,.2f} GiB of a rank, which has "
        f"{room / GIB:,.2f}\n{sharing}; is it the right model=?"
    )
