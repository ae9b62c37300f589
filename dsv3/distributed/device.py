"""The device of a rank, its CPU threads, and the settings of CUDA's allocator; decided without torch."""

import os
from collections.abc import Mapping, MutableMapping

from dsv3.errors import UserError

# torch 2.9 renamed it; an older name that is set still counts.
ALLOCATOR = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
"""Environment variables of the allocator's settings, the current name first."""


def use_expandable_segments(environment: MutableMapping[str, str]) -> None:
    """Let CUDA's allocator grow its segments, unless the user has set it; call before torch starts.

    Sizes change from step to step with the rows that experts get, and with documents. Segments of a fixed
    size would leave gaps until a run that fits ends for want of memory.
    """
    if not any(name in environment for name in ALLOCATOR):
        environment[ALLOCATOR[0]] = "expandable_segments:True"


def choose_gpu(local_rank: int, local_world: int, visible: int, environment: Mapping[str, str]) -> int:
    """Return the number, among the `visible` GPUs, of the one that a rank of this node computes on.

    Either each rank sees all GPUs of the node, and takes that of its own number, or its own GPU alone, as
    srun --gpus-per-task=1 has it.

    Raises:
        UserError: neither is so.
    """
    if visible == 1 and local_world > 1:
        # A launcher that gives a rank its own GPU says so; the only GPU of a node cannot be everyone's.
        if "CUDA_VISIBLE_DEVICES" in environment or "SLURM_PROCID" in environment:
            return 0
    elif local_rank < visible:
        return local_rank
    raise UserError(
        f"{local_world} ranks on this node and {visible} GPUs visible to rank {local_rank} of them: start "
        f"{visible} ranks per node, or give each its own GPU (srun --gpus-per-task=1)"
    )


def cpu_threads(local_world: int, environment: Mapping[str, str]) -> int:
    """Return the threads of a rank on CPU: its share of the cores; for one process alone OMP_NUM_THREADS.

    joblib sets the variable where several jobs of a sweep run at a time: two threads of each on two cores
    would wait for one another at every operation. torchrun sets it to 1 for several ranks, however many cores
    there are.
    """
    asked = environment.get("OMP_NUM_THREADS", "")
    if local_world == 1 and asked.isdigit() and int(asked) > 0:
        return int(asked)
    return max(1, len(os.sched_getaffinity(0)) // local_world)
