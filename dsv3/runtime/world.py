"""How many processes a job has, from the config, the launcher's environment and the machine."""

import math
import os

from dsv3.config import Config
from dsv3.planning.hardware import visible_gpus
from dsv3.runtime.commandline import under_launcher
from dsv3.runtime.errors import UserError


def world_size(config: Config) -> int:
    """Ranks of the job: as launched, as configured, or what the layout needs at least (all GPUs here).

    UserError where the config and the launcher disagree, or the GPUs are not there.
    """
    launch = config.launch
    chosen = launch.world_size or (launch.nproc * launch.nnodes if launch.nproc else None)
    if not config.task.uses_model:
        return chosen or _smallest(config)
    if under_launcher():
        return _launched(chosen)
    if launch.world_size and not launch.nproc:
        raise UserError(
            f"launch.world_size={launch.world_size} alone is for task=plan: "
            "to start processes give launch.nproc (and launch.nnodes)"
        )
    if launch.nnodes > 1 and launch.rendezvous is None and not launch.submits:
        raise UserError(
            f"launch.nnodes={launch.nnodes} needs launch.rendezvous=HOST:PORT of node 0, launch.node_rank=N "
            "on each node; or use torchrun, srun or launch=slurm"
        )
    gpus = 0 if launch.submits else len(visible_gpus())  # those of the node it will run on are not known
    # GPUs that are here set the size of a world that can grow; on CPU the layout does.
    grown = gpus * launch.nnodes if _grows(config) else 1
    world = chosen or (max(_product(config), grown) if gpus else _smallest(config))
    here = world // launch.nnodes
    if gpus and here > gpus:
        raise UserError(
            f"launch.nproc={here}, but this node has {gpus} GPUs: use launch.nproc={gpus} or fewer"
        )
    return world


def ranks_per_node(config: Config, world: int) -> int:
    """Ranks of `world` that share this node's memory: as launched, else as configured."""
    launched = os.environ.get("LOCAL_WORLD_SIZE") if under_launcher() else None
    return max(1, int(launched) if launched and config.task.uses_model else world // config.launch.nnodes)


def _smallest(config: Config) -> int:
    """The smallest world that the layout is made for."""
    product = _product(config)
    return -(-config.parallel.smallest_world // product) * product if _grows(config) else product


def _product(config: Config) -> int:
    """The ranks that the typed degrees need."""
    typed = config.parallel.degrees.typed
    stage = math.prod(typed.get(axis, 1) for axis in ("dp_shard", "cp", "tp"))
    if "dp_shard" not in typed:
        stage = math.lcm(stage, typed.get("ep", 1))
    return stage * typed.get("pp", 1) * typed.get("dp_replicate", 1)


def _grows(config: Config) -> bool:
    """Whether a degree is left to take more ranks."""
    degrees = config.parallel.degrees
    return any(map(degrees.is_auto, ("pp", "dp_replicate", "dp_shard", "cp", "tp")))


def _launched(chosen: int | None) -> int:
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if chosen not in (None, world):
        raise UserError(
            f"launch.nproc x launch.nnodes make {chosen}, but the launcher started {world} processes: "
            "leave launch.* out under torchrun and srun"
        )
    return world
