"""What srun tells a process of its place, in the words of torchrun, which all else reads."""

import re
from collections.abc import Mapping

# Below the ports that Linux hands out by itself, above those that are well known.
_PORTS = range(15_000, 32_000)


def srun_variables(environment: Mapping[str, str]) -> dict[str, str]:
    """RANK, WORLD_SIZE and the rest for a process that srun started as one of several; else nothing.

    Only srun sets SLURM_STEP_NUM_TASKS: a batch script and a shell of salloc have SLURM_NTASKS and
    SLURM_PROCID too, but no others beside them. What torchrun or the user has set stands.
    """
    world = int(environment.get("SLURM_STEP_NUM_TASKS", "1"))
    if world == 1 or "RANK" in environment or "SLURM_PROCID" not in environment:
        return {}
    found = {
        "RANK": environment["SLURM_PROCID"],
        "WORLD_SIZE": str(world),
        "LOCAL_RANK": environment.get("SLURM_LOCALID", "0"),
        "LOCAL_WORLD_SIZE": str(_tasks_here(environment, world)),
        "MASTER_ADDR": first_host(environment.get("SLURM_STEP_NODELIST", "localhost")),
        "MASTER_PORT": str(_port(environment)),
    }
    return {name: environment.get(name, value) for name, value in found.items()}


def in_step(environment: Mapping[str, str]) -> bool:
    """Whether this process runs in a job step, if alone: what was to be submitted is there already."""
    return "SLURM_STEP_ID" in environment


def first_host(nodes: str) -> str:
    """The first of Slurm's compressed list of hosts: `gpu[003-007,012],login` begins with gpu003."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])*", nodes)
    return re.sub(r"\[([^\],-]*)[^\]]*\]", r"\1", first[0] if first else nodes)


def tasks_per_node(text: str) -> list[int]:
    """Slurm's `8(x2),4` as [8, 8, 4]."""
    found = re.findall(r"(\d+)(?:\(x(\d+)\))?", text)
    return [int(tasks) for tasks, times in found for _ in range(int(times or 1))]


def _tasks_here(environment: Mapping[str, str], world: int) -> int:
    """Tasks of the step on this node."""
    counts = tasks_per_node(environment.get("SLURM_STEP_TASKS_PER_NODE", ""))
    node = int(environment.get("SLURM_NODEID", "0"))
    return counts[node] if node < len(counts) else int(environment.get("SLURM_NTASKS_PER_NODE", world))


def _port(environment: Mapping[str, str]) -> int:
    """One port for all ranks of a step, another for the next job on the same node."""
    job, step = (int(environment.get(name, "0")) for name in ("SLURM_JOB_ID", "SLURM_STEP_ID"))
    return _PORTS[(job * 7 + step) % len(_PORTS)]
