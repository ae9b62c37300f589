"""Runs that start again by themselves: what is a reason to, who decides, and where the run goes on."""

import socket
import threading
import time
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dsv3.checkpoint.directory import CONFIG_FILE
from dsv3.distributed.signals import Stopped
from dsv3.errors import RunFailed, RunOver, UserError
from dsv3.launch import restarts
from dsv3.launch.job import Job
from dsv3.launch.rendezvous import Attempt, Rendezvous
from dsv3.launch.restarts import on_nodes, run_in_workers
from dsv3.launch.workers import EndedElsewhere, RankRaised
from tests.harness.commands import PlannedCommand
from tests.harness.processes import until

NODES = ("parallel=fsdp", "launch.nproc=2", "hardware=cpu", "model=debug")
BATCH = "train.global_batch_size=16"

Worker = Callable[[Job, Attempt], float]


class Launchers:
    """Launchers of the nodes of one run, each a thread, with functions in the place of their workers."""

    def __init__(self, job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
        self.job = job
        self.jobs: dict[int, list[Job]] = {}
        self.ended: dict[int, Any] = {}
        self.workers: dict[int, Worker] = {}
        monkeypatch.setattr(restarts, "start_workers", self._work)
        monkeypatch.setattr(restarts, "check_same_run", lambda *_: None)
        self.waits: set[tuple[int, int]] = set()
        """Nodes and numbers of the attempts that they have come to and wait for."""
        self.begun: set[tuple[int, int]] = set()
        """Nodes and numbers of the attempts that they have begun."""
        wait = Rendezvous.wait

        def noted(rendezvous: Rendezvous, number: int) -> Attempt | None:
            self.waits.add((rendezvous.node, number))
            return wait(rendezvous, number)

        monkeypatch.setattr(Rendezvous, "wait", noted)

    def _work(self, job: Job, rendezvous: Rendezvous, attempt: Attempt, on_run_dir: Any) -> float:
        self.jobs.setdefault(rendezvous.node, []).append(job)
        on_run_dir(self.job.run_dir)
        # Ranks meet before any of them can end: a node that begins late finds the others.
        self.begun.add((rendezvous.node, attempt.number))
        ends = time.monotonic() + 20
        while any((node, attempt.number) not in self.begun for node in attempt.nodes):
            if time.monotonic() > ends:
                break
            time.sleep(0.01)
        with rendezvous.watch(attempt.number, lambda: None):
            return self.workers[rendezvous.node](job, attempt)

    def start(self, node: int, worker: Worker) -> threading.Thread:
        """Start the launcher of a node in a thread."""
        self.workers[node] = worker
        launch = replace(self.job.config.launch, node_rank=node)
        job = replace(self.job, config=replace(self.job.config, launch=launch))

        def run() -> None:
            try:
                self.ended[node] = run_in_workers(job)
            except BaseException as error:
                self.ended[node] = error

        thread = threading.Thread(target=run)
        thread.start()
        return thread

    def run(self, *workers: Worker) -> dict[int, Any]:
        """Run one launcher per worker, node 0 last; return what each has returned or raised."""
        threads = [self.start(node, worker) for node, worker in reversed(list(enumerate(workers)))]
        for thread in threads:
            thread.join(60)
        return self.ended


@pytest.fixture
def launchers(
    planned: PlannedCommand, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Launchers]:
    """Make the launchers of a job of two nodes, or as many as are asked for."""

    def make(*arguments: str, nodes: int = 2) -> Launchers:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            address = f"launch.rendezvous=127.0.0.1:{free.getsockname()[1]}"
        several = [f"launch.nnodes={nodes}", address] if nodes > 1 else []
        typed = {each.partition("=")[0]: each for each in (BATCH, "launch.timeout=2", *arguments)}
        job = planned.run(*NODES, *several, *typed.values(), f"run.dir={tmp_path / 'run'}").job
        return Launchers(job, monkeypatch)

    monkeypatch.setattr(restarts, "_PAUSE", 0.01)
    return make


def begin_run(directory: Path, *steps: int) -> None:
    """Leave what a run leaves that has saved after these steps."""
    directory.mkdir(exist_ok=True)
    (directory / CONFIG_FILE).touch()
    for step in steps:
        (directory / "checkpoints" / f"step-{step}").mkdir(parents=True, exist_ok=True)
        (directory / "checkpoints" / f"step-{step}" / ".metadata").touch()


def failing(*failures: BaseException, directory: Path | None = None, steps: tuple[int, ...] = ()) -> Worker:
    """Workers that end with these failures, one an attempt, and then with 1.5.

    In `directory` each attempt saves after its entry of `steps`, if it has one.
    """

    def work(job: Job, attempt: Attempt) -> float:
        if directory is not None:
            begin_run(directory, *steps[attempt.number : attempt.number + 1])
        if attempt.number < len(failures):
            raise failures[attempt.number]
        return 1.5

    return work


def test_a_failure_is_restarted_from_the_newest_checkpoint_and_told(
    launchers: Callable[..., Launchers], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = launchers("launch.max_restarts=1", nodes=1)
    lost = RunFailed("rank 1 (pid 7) was ended by SIGKILL; the other workers were stopped")
    assert run.run(failing(lost, directory=tmp_path / "run", steps=(40,))) == {0: 1.5}
    first, second = run.jobs[0]
    assert (first.config.run.resume, second.config.run.resume) == (False, True)
    assert second.run_dir == tmp_path / "run"
    assert second.restart is not None
    assert second.restart["reason"] == str(lost)
    line = f"restart 1 of 1 from step 40: {lost}"
    assert (line, [line]) == (capsys.readouterr().err.strip(), second.notes)


def test_a_restart_keeps_the_stacks_of_the_hang(launchers: Callable[..., Launchers], tmp_path: Path) -> None:
    run, directory = launchers("launch.max_restarts=2", nodes=1), tmp_path / "run"

    def hang(job: Job, attempt: Attempt) -> float:
        begin_run(directory)
        assert not (directory / "stacks").exists()  # the watchdog waits for the files of this attempt
        if attempt.number == 2:
            return 1.5
        (directory / "stacks").mkdir()
        (directory / "stacks" / "rank-0.txt").write_text(str(attempt.number))
        raise RunFailed("no progress for 2 s (launch.timeout)\nrank 0 at ...")

    assert run.run(hang) == {0: 1.5}
    kept = [(directory / f"stacks-{number}" / "rank-0.txt").read_text() for number in (1, 2)]
    assert kept == ["0", "1"]
    notes = [job.notes[0] for job in run.jobs[0][1:]]
    assert [note.rpartition("; ")[2] for note in notes] == ["stacks: stacks-1/", "stacks: stacks-2/"]


def test_a_run_without_its_config_begins_anew_in_its_directory(launchers: Callable[..., Launchers]) -> None:
    run = launchers("launch.max_restarts=1", nodes=1)
    assert run.run(failing(RunFailed("too early"))) == {0: 1.5}
    again = run.jobs[0][1]
    assert (again.config.run.resume, again.named_run_dir, again.run_dir) == (False, True, run.job.run_dir)


@pytest.mark.parametrize("end", [UserError("typed wrong"), RunOver("too many"), Stopped("saved")])
def test_what_a_restart_would_not_mend_ends_the_run(
    end: BaseException, launchers: Callable[..., Launchers]
) -> None:
    run = launchers("launch.max_restarts=3", nodes=1)
    assert run.run(failing(end)) == {0: end}
    assert len(run.jobs[0]) == 1


def test_restarts_count_while_no_new_checkpoint_comes(
    launchers: Callable[..., Launchers], tmp_path: Path
) -> None:
    run = launchers("launch.max_restarts=2", nodes=1)
    failures = [RunFailed(f"failure {number}") for number in range(9)]
    # Two restarts, the second without progress, then a checkpoint, and two restarts in vain.
    fail = failing(*failures, directory=tmp_path / "run", steps=(10, 10, 20, 20, 20))
    held = list[weakref.ref[threading.Event]]()

    def hold_and_fail(job: Job, attempt: Attempt) -> float:
        """An agent of torch holds descriptors, in circles: none is left at the next attempt."""
        assert [each for each in held if each() is not None] == []
        held.append(weakref.ref(own := threading.Event()))
        own.circle = own  # type: ignore[attr-defined]
        return fail(job, attempt)

    ended = run.run(hold_and_fail)[0]
    assert str(ended) == "failure 4\nlaunch.max_restarts=2: 2 restarts led to no new checkpoint"
    assert len(held) == 5
    counts = [job.restart["restart"] for job in run.jobs[0][1:] if job.restart is not None]
    assert counts == [1, 2, 1, 2]


def test_a_stop_between_two_attempts_says_how_to_go_on(
    launchers: Callable[..., Launchers], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(seconds: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("dsv3.launch.restarts.time.sleep", stop)
    run = launchers("launch.max_restarts=2", nodes=1)
    failures = [RunFailed("first"), RunFailed("second")]
    ended = run.run(failing(*failures, directory=tmp_path / "run", steps=(4,)))[0]
    assert isinstance(ended, Stopped)
    assert ended.message.startswith("stopped before another step; nothing is lost, go on: ")
    assert ended.message.endswith(f"resume={tmp_path / 'run'}")


def test_without_restarts_a_failure_is_what_it_was(launchers: Callable[..., Launchers]) -> None:
    run = launchers(nodes=1)
    failure = RunFailed("dead")
    assert run.run(failing(failure)) == {0: failure}


def test_nodes_restart_together_and_learn_the_cause_from_the_one_that_knows_it(
    launchers: Callable[..., Launchers], tmp_path: Path
) -> None:
    """A dead rank on node 1 makes ranks of node 0 raise, and both come to the next attempt."""
    run = launchers("launch.max_restarts=1")
    consequence, cause = RankRaised("Connection closed by peer"), RunFailed("rank 1 was ended by SIGKILL")
    directory = tmp_path / "run"
    assert run.run(failing(consequence, directory=directory, steps=(3,)), failing(cause)) == {0: 1.5, 1: 1.5}
    for node in (0, 1):
        first, second = run.jobs[node]
        assert second.config.run.resume
        assert second.plan == first.plan
        assert second.restart is not None
        assert (second.restart["reason"], second.restart["missing"]) == (str(cause), [])


def test_a_mistake_on_one_node_ends_all_and_is_told_on_all(launchers: Callable[..., Launchers]) -> None:
    run = launchers("launch.max_restarts=5")
    mistake = UserError("data.path=/here does not exist")
    ended = run.run(failing(EndedElsewhere("")), failing(mistake))
    assert [(type(error), str(error)) for error in ended.values()] == [(UserError, str(mistake))] * 2
    assert [len(jobs) for jobs in run.jobs.values()] == [1, 1]


def test_a_node_that_does_not_come_back_is_done_without_and_comes_in_at_the_next_restart(
    launchers: Callable[..., Launchers], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = launchers("launch.max_restarts=2")
    directory, replaced = tmp_path / "run", threading.Event()

    def leave(job: Job, attempt: Attempt) -> float:
        raise SystemExit  # the machine is gone

    def survive(job: Job, attempt: Attempt) -> float:
        begin_run(directory, attempt.number + 1)
        if attempt.number == 1:
            run.start(1, lambda job, attempt: 2.5)  # its replacement waits for the next attempt
            replaced.set()
            until(lambda: (1, 2) in run.waits)
        if attempt.number < 2:
            raise RankRaised("Connection closed by peer")
        until(lambda: len(run.jobs[1]) == 2)  # workers would wait for those of the other node
        return 1.5

    assert run.run(survive, leave)[0] == 1.5
    assert replaced.is_set()
    until(lambda: bool(run.ended[1] == 2.5))
    whole, fewer, again = run.jobs[0]
    assert (whole.plan.world_size, fewer.plan.world_size, again.plan.world_size) == (4, 2, 4)
    assert fewer.config.train.batch == whole.config.train.batch == 16
    assert fewer.restart is not None
    assert fewer.restart["missing"] == [1]
    assert "restart 1 of 2 from step 1 without node 1: Connection closed" in capsys.readouterr().err
    assert run.ended[1] == 2.5


def test_a_layout_that_needs_the_lost_node_ends_with_the_reason(
    launchers: Callable[..., Launchers], tmp_path: Path
) -> None:
    run = launchers("launch.max_restarts=2", "parallel.degrees.dp_shard=4")

    def leave(job: Job, attempt: Attempt) -> float:
        raise SystemExit

    ended = run.run(failing(RankRaised("gone"), directory=tmp_path / "run", steps=(1,)), leave)[0]
    assert type(ended) is RunFailed
    first, second = str(ended).splitlines()
    assert first == "gone"
    assert second.startswith(
        "node 1 did not come back in 2 s (launch.timeout), and the layout does not go on"
    )
    assert "dp_shard" in second


def test_fewer_nodes_keep_the_batch_by_accumulation(planned: PlannedCommand) -> None:
    several = ("launch.nnodes=4", "launch.rendezvous=a:1")
    job = planned.run(*NODES, BATCH, *several, "run.dir=run").job
    half = on_nodes(job, 2)
    assert (half.plan.world_size, half.config.train.batch) == (4, 16)
    accumulated = [16 // each.plan.world_size // each.config.train.microbatch for each in (job, half)]
    assert (
        accumulated[0] * 2 == accumulated[1]
        or half.config.train.microbatch == 2 * job.config.train.microbatch
    )
    with pytest.raises(UserError):
        on_nodes(job, 3)  # 6 ranks do not divide 16 sequences


def test_a_node_that_does_not_come_at_all_is_named(launchers: Callable[..., Launchers]) -> None:
    run = launchers("train.global_batch_size=24", nodes=3)
    ended = run.run(failing(), failing())
    assert {type(error) for error in ended.values()} == {UserError}
    assert len(set(map(str, ended.values()))) == 1
    assert "node 2 of 3 did not come in 2 s (launch.timeout)" in str(ended[0])
    alone = launchers("launch.node_rank=1")
    alone.start(1, failing()).join(60)
    assert (
        "did not answer in 2 s (launch.timeout): Connection refused; start the same command on node 0"
        in str(alone.ended[1])
    )


def test_nodes_that_were_told_otherwise_are_refused(launchers: Callable[..., Launchers]) -> None:
    launch = launchers().job.config.launch
    told: list[str] = []

    def come(node: int, ranks: int) -> None:
        try:
            with Rendezvous(replace(launch, node_rank=node), ranks) as rendezvous:
                rendezvous.meet(0)
                rendezvous.wait(0)
        except UserError as error:
            told.append(str(error))

    nodes = [threading.Thread(target=come, args=each) for each in ((1, 4), (0, 2))]
    for thread in nodes:
        thread.start()
    for thread in nodes:
        thread.join(30)
    assert told == ["launch.nproc: node 1 has 4, node 0 has 2: type the same on every node"] * 2


def test_a_node_whose_node_0_is_gone_says_so(launchers: Callable[..., Launchers]) -> None:
    launch = launchers().job.config.launch
    node0 = Rendezvous(launch, 2).__enter__()
    with Rendezvous(replace(launch, node_rank=1), 2) as node1:
        node0.store = None  # its server ends with it
        for request in (lambda: node1.meet(1, RunFailed("why")), lambda: node1.wait(1)):
            with pytest.raises(RunFailed, match="the launcher of node 0 has ended"):
                request()


@pytest.mark.parametrize("entry", [b"\x80\x04junk", b"[" * 100_000, b'{"nodes": [9]}', b'{"nodes": "all"}'])
def test_what_no_launcher_has_written_is_refused(entry: bytes, launchers: Callable[..., Launchers]) -> None:
    launch = launchers().job.config.launch
    with Rendezvous(launch, 2) as node0:
        node0.store.set("0: go", entry)
        with (
            Rendezvous(replace(launch, node_rank=1), 2) as node1,
            pytest.raises(RunFailed, match="has not written"),
        ):
            node1.wait(0)
