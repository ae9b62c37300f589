"""Run a job in workers of this command, and start it again from its newest checkpoint when it fails.

launch.max_restarts says how often in a row without a new checkpoint in between. A mistake of the user's, a
stop and a failure that would repeat itself (RunOver) are no reasons to start again. On several nodes all
launchers do this together: node 0 decides, and tells the others through the rendezvous.
"""

import gc
import itertools
import shlex
import sys
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from dsv3.checkpoint.directory import CONFIG_FILE, newest_checkpoint, step_number
from dsv3.config.registry import command
from dsv3.distributed.signals import Stopped, leave_on_signal
from dsv3.distributed.watchdog import STACKS_DIR
from dsv3.errors import RunFailed, RunOver, UserError, comma_separated
from dsv3.launch.job import Job, plan_job
from dsv3.launch.nearest_fix import require_fits
from dsv3.launch.rendezvous import Attempt, Rendezvous, as_failure
from dsv3.launch.run_dir import check_same_run, own_run_dir
from dsv3.launch.workers import start_workers
from dsv3.metrics.accident_journal import RESTART

_PAUSE, _LONGEST_PAUSE = 10.0, 300.0
"""Seconds before the second restart in a row without progress, and the most: each pause doubles the last.

The first restart is immediate. A file system that is away for some minutes must not use all of them up.
"""

_ASKS = 5.0
"""Seconds that the other nodes have to say why the last attempt failed."""

_TELLING = ["UserError", "InvalidValue", "RunOver", "RunFailed", "RankRaised", "EndedElsewhere"]
"""Kinds of failures, the one that says most about the cause first: a killed rank makes others raise."""


def run_in_workers(job: Job) -> float | None:
    """Run the job on this node's ranks; return rank 0's result where it is here, else None.

    Raises:
        UserError, RunFailed: the last failure, where no restart is left or none would help.
        Stopped: the run was asked to stop, and has saved.
    """
    launch, allowed = job.config.launch, allowed_restarts(job)
    with Rendezvous(launch, job.plan.world_size // launch.nnodes) as rendezvous:
        run = _Run(job, rendezvous, allowed)
        try:
            # Between two attempts there is something that can be gone on with: not the end at once.
            with leave_on_signal(raises=lambda: True):
                return _attempts(run)
        except KeyboardInterrupt:
            if run.step < 0 or run.directory is None or not (run.directory / CONFIG_FILE).is_file():
                raise
            resume = shlex.join([*command("train"), f"resume={run.directory}", *job.resume_flags])
            raise Stopped(f"stopped before another step; nothing is lost, go on: {resume}") from None


def _attempts(run: "_Run") -> float | None:
    """Make attempts until one ends as it should, or there is no further one."""
    number, node = run.rendezvous.current_attempt(), run.rendezvous.node
    failure: UserError | RunFailed | None = None
    while True:
        attempt = run.next_attempt(number, failure)
        if attempt is None:  # the run has ended without this node
            if failure is not None:
                raise failure
            return None
        number = attempt.number + 1
        if node not in attempt.nodes:
            print(
                f"node {node} is not needed now: it waits for the next restart", file=sys.stderr, flush=True
            )
            failure = None
            continue
        try:
            return start_workers(run.job_of(attempt), run.rendezvous, attempt, run.enter)
        except (UserError, RunFailed) as error:
            if not run.allowed:
                raise
            # What an attempt leaves hangs on the traceback, in circles, and holds a dozen descriptors.
            error.__traceback__ = error.__context__ = None
            failure = error
        gc.collect()


def allowed_restarts(job: Job) -> int:
    """Return the restarts that the job may have: a task that writes no run has nothing to go on from.

    Under Slurm the batch script restarts.
    """
    launch = job.config.launch
    return launch.max_restarts if job.config.task.writes_run and not launch.submits else 0


@dataclass
class _Run:
    """One run over its attempts, as the launcher of one node sees it."""

    job: Job
    """As it was planned for all nodes."""
    rendezvous: Rendezvous
    allowed: int
    used: int = 0
    """Restarts since the last one that found a new checkpoint."""
    step: int = -1
    """Step of the newest checkpoint at the last restart; -1 before the first."""
    directory: Path | None = None
    """Of the run, once rank 0 has made it."""
    plans: dict[int, Job] = field(default_factory=dict)
    """The job on fewer nodes, by their number."""

    def enter(self, directory: Path) -> None:
        """Take note of where the run is."""
        self.directory = directory

    def next_attempt(self, number: int, failure: UserError | RunFailed | None) -> Attempt | None:
        """Meet the other nodes and return the attempt that node 0 lets begin; None for none.

        Raises:
            UserError, RunFailed: the run is at its end, with the failure that says most.
        """
        if self.rendezvous.node > 0:
            self.rendezvous.meet(number, failure)
            return self.rendezvous.wait(number)
        told: dict[str, Any] = {}
        if isinstance(failure, UserError | RunOver):
            raise failure
        # Where none is left, the others are only asked for the cause.
        here = self.rendezvous.meet(number, failure, 0.0 if failure is None or self._may_restart() else _ASKS)
        nodes = tuple(sorted(here))
        if failure is not None:
            cause = _most_telling(here.values(), failure)
            self._require_restartable(cause)
            told, nodes = self._restart(cause, nodes)
        attempt = Attempt(number, nodes, told)
        self.rendezvous.begin(attempt)
        return attempt

    def job_of(self, attempt: Attempt) -> Job:
        """Return the job of an attempt: the run's own, or one that resumes it, on the nodes there are."""
        job = self._planned(len(attempt.nodes))
        restart = attempt.told.get("restart")
        if not isinstance(restart, dict):
            return job
        self.directory = directory = Path(str(attempt.told.get("run_dir")))
        print(restart_line(restart), file=sys.stderr, flush=True)
        job = replace(job, run_dir=directory, named_run_dir=True, restart=restart)
        if self.rendezvous.node == 0:  # of a default directory rank 0 had the lock
            own_run_dir(job)
        if not attempt.told.get("resume"):
            return job
        config = replace(job.config, run=replace(job.config.run, dir=str(directory), resume=True))
        notes = [restart_line(restart)]
        return replace(job, config=config, notes=notes, recipe=[])

    def _require_restartable(self, failure: UserError | RunFailed) -> None:
        """Raise `failure` where another attempt would end as this one, or none is left."""
        if isinstance(failure, UserError | RunOver):
            raise failure
        if not self._may_restart():
            raise type(failure)(
                f"{failure}\nlaunch.max_restarts={self.allowed}: "
                f"{self.used} restart{'s' if self.used > 1 else ''} led to no new checkpoint"
            )

    def _may_restart(self) -> bool:
        """Return whether there is a restart left: while a new checkpoint comes there is."""
        return self.used < self.allowed or self._newest() > self.step

    def _newest(self) -> int:
        """Return the step of the run's newest checkpoint, 0 where there is none."""
        newest = newest_checkpoint(self.directory) if self.directory is not None else None
        return step_number(newest) if newest is not None else 0

    def _restart(
        self, cause: UserError | RunFailed, here: tuple[int, ...]
    ) -> tuple[dict[str, Any], tuple[int, ...]]:
        """Decide how the run goes on after `cause`; return what to tell, and the nodes that it goes on with.

        Raises:
            UserError: the newest checkpoint is damaged.
            RunFailed: the layout does not go on fewer nodes.
        """
        newest = self._newest()
        if newest > self.step:
            self.used, self.step = 0, newest
        self.used += 1
        nodes = self._fitting(here, cause)
        directory = self.directory or self.job.run_dir
        resume = (directory / CONFIG_FILE).is_file()
        if resume:
            check_same_run(self.job.config, directory)
        pause = 0.0 if self.used == 1 else min(_PAUSE * 2 ** (self.used - 2), _LONGEST_PAUSE)
        if pause:
            print(f"waiting {pause:g} s before restart {self.used}", file=sys.stderr, flush=True)
            time.sleep(pause)
        restart = {
            "kind": RESTART,
            "step": newest,
            "restart": self.used,
            "of": self.allowed,
            "reason": str(cause)[:2000],
            "nodes": list(nodes),
            "missing": sorted({*range(self.job.config.launch.nnodes)} - {*nodes}),
            "stacks": _set_stacks_aside(directory),
        }
        return {"restart": restart, "run_dir": str(directory.absolute()), "resume": resume}, nodes

    def _fitting(self, here: tuple[int, ...], cause: UserError | RunFailed) -> tuple[int, ...]:
        """Return the nodes that the run goes on with: all that are here, or as many as the layout takes."""
        first: UserError | None = None
        for count in range(len(here), 0, -1):
            try:
                self._planned(count)
            except UserError as error:
                first = first or error
                continue
            return here[:count]
        lost = sorted({*range(self.job.config.launch.nnodes)} - {*here})
        raise RunFailed(
            f"{cause}\nnode {comma_separated(lost[:8])} did not come back in "
            f"{self.job.config.launch.timeout} s (launch.timeout), and the layout does not go on fewer "
            f"nodes: {str(first).partition(chr(10))[0]}"
        )

    def _planned(self, nodes: int) -> Job:
        """Return the job on so many nodes; UserError where the layout or the memory does not allow it."""
        if nodes == self.job.config.launch.nnodes:
            return self.job
        if nodes not in self.plans:
            self.plans[nodes] = on_nodes(self.job, nodes)
        return self.plans[nodes]


def _set_stacks_aside(run_dir: Path) -> str | None:
    """Keep the stacks of the hang that has ended an attempt from the next one; return their folder's name."""
    stacks = run_dir / STACKS_DIR
    if not stacks.is_dir():
        return None
    names = (f"{STACKS_DIR}-{number}" for number in itertools.count(1))
    name = next(name for name in names if not (run_dir / name).exists())
    stacks.rename(run_dir / name)
    return name


def on_nodes(job: Job, nodes: int) -> Job:
    """Plan the job anew on another number of nodes, with its global batch; UserError where it cannot be."""
    config, whole = job.config, job.config.launch.nnodes
    launch = replace(
        config.launch, nnodes=nodes, nproc=job.plan.world_size // whole, world_size=None, node_rank=0
    )
    train = config.train
    if "train.microbatch_size" in job.reasons:  # it was filled in to suit the number of ranks
        train = replace(train, microbatch_size=None)
    planned = plan_job(replace(config, launch=launch, train=train), job.overrides, job.run_dir)
    require_fits(planned)
    reasons = job.reasons | planned.reasons
    return replace(job, config=planned.config, plan=planned.plan, hardware=planned.hardware, reasons=reasons)


def _most_telling(records: Iterable[Mapping[str, Any]], own: UserError | RunFailed) -> UserError | RunFailed:
    """Return the failure of a node that says most about the cause, of what the nodes have come with."""
    told = [failure for failure in map(as_failure, records) if failure[0] in _TELLING]
    kind, text = min(told, key=lambda failure: _TELLING.index(failure[0]), default=("", ""))
    if kind in ("", type(own).__name__):
        return own
    if kind in ("UserError", "InvalidValue"):
        return UserError(text)
    return RunOver(text) if kind == "RunOver" else RunFailed(text)


def restart_line(restart: Mapping[str, Any]) -> str:
    """Return the line that tells a restart, of its entry in accidents.jsonl."""
    missing = restart.get("missing") or []
    fewer = f" without node {comma_separated(missing[:8])}" if missing else ""
    reason = str(restart.get("reason", "")).partition("\n")[0]
    count = f"restart {restart.get('restart')} of {restart.get('of')}"
    stacks = f"; stacks: {restart['stacks']}/" if restart.get("stacks") else ""
    return f"{count} from step {restart.get('step')}{fewer}: {reason}{stacks}"
