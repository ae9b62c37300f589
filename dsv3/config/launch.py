"""How a command is started, where it writes, and whether it is profiled."""

import re
from dataclasses import dataclass, field
from typing import ClassVar

from dsv3.errors import require, require_positive

WEEK = 7 * 24 * 3600


@dataclass
class LaunchConfig:
    """Processes: `nproc` a node on `nnodes` nodes; null means the smallest world the layout needs.

    On several nodes the command is typed on each, with its `node_rank` and one `rendezvous`, HOST:PORT
    of node 0. `world_size` alone is for planning a world that is not here. `timeout` is how many seconds
    a run of several ranks may go without a step before it counts as hung.
    """

    submits: ClassVar[bool] = False
    nproc: int | None = None
    nnodes: int = 1
    node_rank: int = 0
    rendezvous: str | None = None
    world_size: int | None = None
    timeout: int = 600

    def validate(self) -> None:
        allowed = f"must be 0 to {self.nnodes - 1}: launch.nnodes={self.nnodes}"
        require(0 <= self.node_rank < self.nnodes, "node_rank", self.node_rank, allowed)
        if self.rendezvous is not None:
            allowed = "must be HOST:PORT of node 0, the same on every node"
            found = re.fullmatch(r".+:(\d{1,5})", self.rendezvous)
            require(found is not None and 0 < int(found[1]) < 65536, "rendezvous", self.rendezvous, allowed)
        require_positive(self, "nproc", "nnodes", "world_size")
        require(0 < self.timeout <= WEEK, "timeout", self.timeout, f"must be 1 to {WEEK} seconds (a week)")
        if self.nproc is not None and self.world_size is not None:
            world = self.nproc * self.nnodes
            allowed = (
                f"launch.nproc={self.nproc} x launch.nnodes={self.nnodes} make {world}; give one of the two"
            )
            require(self.world_size == world, "world_size", self.world_size, allowed)


@dataclass
class SlurmLaunchConfig(LaunchConfig):
    """`python train.py launch=slurm` submits itself with sbatch; srun then starts one process a rank.

    `sbatch` are further options as one would type them, such as "--mem=0 --qos=high".
    """

    submits: ClassVar[bool] = True
    partition: str | None = None
    account: str | None = None
    time: str | None = None
    cpus_per_task: int | None = None
    sbatch: str | None = None

    def validate(self) -> None:
        super().validate()
        require_positive(self, "cpus_per_task")


@dataclass
class ProfileConfig:
    """torch.profiler over `steps` steps after `wait` unprofiled ones."""

    enabled: bool = False
    wait: int = 2
    steps: int = 3

    def validate(self) -> None:
        require(self.wait >= 0, "wait", self.wait, "must be 0 or more")
        require_positive(self, "steps")


@dataclass
class RunConfig:
    """`dir` is the run directory (default outputs/ID, multirun/ID/N in a sweep).

    `resume` is set by resume=DIR. `allow_targets` names modules, beside dsv3 and torch.optim, whose
    classes a `_target_` may name. It counts only when typed on the command line: a stored config
    cannot widen what it may run.
    """

    dir: str | None = None
    resume: bool = False
    allow_targets: list[str] = field(default_factory=list)
