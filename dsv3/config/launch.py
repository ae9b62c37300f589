"""Schemas of the `launch` and `profile` groups and of the `run` node."""

import re
from dataclasses import dataclass, field
from typing import ClassVar

from dsv3.config.registry import PATH, schema
from dsv3.errors import require, require_positive

WEEK = 7 * 24 * 3600


@schema("launch/local")
@dataclass
class LaunchConfig:
    """Processes on this machine, or on several nodes where the command is typed on each.

    On several nodes every node gets its `node_rank` and the same `rendezvous`.
    """

    submits: ClassVar[bool] = False
    """True where the command hands itself to a scheduler instead of starting processes."""
    nproc: int | None = None
    """Processes per node; null is all GPUs here, or on CPU the smallest world that the layout needs."""
    nnodes: int = 1
    """Nodes."""
    node_rank: int = 0
    """Number of this node, from 0."""
    rendezvous: str | None = None
    """HOST:PORT of node 0, the same on every node; null is one node."""
    world_size: int | None = None
    """Ranks of a world to plan with task=plan; processes are started by nproc and nnodes."""
    timeout: int = 600
    """Seconds without progress of any rank after which a run counts as hung; nodes wait as long to meet."""
    max_restarts: int = 0
    """Restarts from the newest checkpoint, in a row without a new one, after a rank died, hung or failed."""

    def validate(self) -> None:
        allowed = f"must be 0 to {self.nnodes - 1}: launch.nnodes={self.nnodes}"
        require(0 <= self.node_rank < self.nnodes, "node_rank", self.node_rank, allowed)
        if self.rendezvous is not None:
            allowed = "must be HOST:PORT of node 0, the same on every node"
            found = re.fullmatch(r".+:(\d{1,5})", self.rendezvous)
            require(found is not None and 0 < int(found[1]) < 65536, "rendezvous", self.rendezvous, allowed)
        require_positive(self, "nproc", "nnodes", "world_size")
        require(self.max_restarts >= 0, "max_restarts", self.max_restarts, "must be 0 or more")
        require(0 < self.timeout <= WEEK, "timeout", self.timeout, f"must be 1 to {WEEK} seconds (a week)")
        if self.nproc is not None and self.world_size is not None:
            world = self.nproc * self.nnodes
            allowed = (
                f"launch.nproc={self.nproc} x launch.nnodes={self.nnodes} make {world}; give one of the two"
            )
            require(self.world_size == world, "world_size", self.world_size, allowed)


@schema("launch/slurm")
@dataclass
class SlurmLaunchConfig(LaunchConfig):
    """`python train.py launch=slurm` submits itself with sbatch; srun then starts one process per rank."""

    submits: ClassVar[bool] = True
    """True: the command hands itself to sbatch."""
    partition: str | None = None
    """Slurm partition; null is the cluster's default."""
    account: str | None = None
    """Slurm account; null is the user's default."""
    time: str | None = None
    """Time limit as Slurm reads it, such as 1-12:00:00; null is the partition's."""
    cpus_per_task: int | None = None
    """CPU cores per rank; null is the cluster's default."""
    requeue: bool = False
    """Let the job go on by itself after a preemption, a lost node and the time limit, by way of the queue."""
    sbatch: str | None = None
    """Further options of sbatch as one types them, such as "--mem=0 --qos=high"."""

    def validate(self) -> None:
        super().validate()
        require_positive(self, "cpus_per_task")


@schema("profile", choice="off")
@dataclass
class ProfileConfig:
    """torch.profiler over a few steps."""

    enabled: bool = False
    """Profile the run."""
    wait: int = 2
    """Steps that run unprofiled first."""
    steps: int = 3
    """Steps that are profiled."""

    def validate(self) -> None:
        require(self.wait >= 0, "wait", self.wait, "must be 0 or more")
        require_positive(self, "steps")


@dataclass
class RunConfig:
    """The run directory, and the modules that a command may build classes from."""

    dir: str | None = field(default=None, metadata=PATH)
    """Run directory; null is outputs/ID, in a sweep multirun/ID/N."""
    resume: bool = False
    """Set by resume=DIR, never directly: continue the run in `dir`."""
    allow_targets: list[str] = field(default_factory=list)
    """Modules beside dsv3 and torch.optim that a `_target_` may name; counts only when typed."""
