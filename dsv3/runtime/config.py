"""How a command is started, where it writes, and whether it is profiled."""

from dataclasses import dataclass, field

from dsv3.runtime.errors import require, require_positive

WEEK = 7 * 24 * 3600


@dataclass
class LaunchConfig:
    """Processes: `nproc` a node on `nnodes` nodes; null means the smallest world the layout needs.

    `world_size` alone is for planning a world that is not here. `timeout` is in seconds.
    """

    nproc: int | None = None
    nnodes: int = 1
    world_size: int | None = None
    timeout: int = 600

    def validate(self) -> None:
        require_positive(self, "nproc", "nnodes", "world_size")
        require(0 < self.timeout <= WEEK, "timeout", self.timeout, f"must be 1 to {WEEK} seconds (a week)")
        if self.nproc is not None and self.world_size is not None:
            world = self.nproc * self.nnodes
            allowed = (
                f"launch.nproc={self.nproc} x launch.nnodes={self.nnodes} make {world}; give one of the two"
            )
            require(self.world_size == world, "world_size", self.world_size, allowed)


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
