"""srun's variables in torchrun's words, and the script that launch=slurm submits."""

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from dsv3.launch.slurm import batch_script, first_host, srun_variables, tasks_per_node
from tests.harness.commands import PlannedCommand
from tests.harness.processes import CommandLine, rows, until
from tests.launch import stubs

STEP = {
    "SLURM_JOB_ID": "1234567",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": "12",
    "SLURM_STEP_TASKS_PER_NODE": "8,4",
    "SLURM_STEP_NODELIST": "gpu[07-08]",
    "SLURM_PROCID": "9",
    "SLURM_NODEID": "1",
    "SLURM_LOCALID": "1",
}


def test_a_task_of_srun_knows_its_place() -> None:
    found = srun_variables(STEP)
    assert found.pop("MASTER_PORT").isdecimal()
    assert found == {
        "RANK": "9",
        "WORLD_SIZE": "12",
        "LOCAL_RANK": "1",
        "LOCAL_WORLD_SIZE": "4",
        "MASTER_ADDR": "gpu07",
    }


def test_ranks_of_one_node_meet_on_the_loopback() -> None:
    assert (
        srun_variables(STEP | {"SLURM_STEP_TASKS_PER_NODE": "12", "SLURM_NODEID": "0"})["MASTER_ADDR"]
        == "127.0.0.1"
    )


def test_all_ranks_of_a_step_meet_at_one_port_and_another_step_at_another() -> None:
    ports = {srun_variables(STEP | {"SLURM_PROCID": str(rank)})["MASTER_PORT"] for rank in range(12)}
    assert len(ports) == 1
    assert 1024 < int(*ports) < 32768
    assert srun_variables(STEP | {"SLURM_STEP_ID": "1"})["MASTER_PORT"] not in ports
    assert srun_variables(STEP | {"SLURM_JOB_ID": "1234568"})["MASTER_PORT"] not in ports
    assert srun_variables(STEP | {"MASTER_PORT": "77"})["MASTER_PORT"] == "77"


@pytest.mark.parametrize(
    "changed",
    [
        {"SLURM_STEP_NUM_TASKS": "1"},  # srun -n 1, or a shell that salloc opened on a node
        {"RANK": "3"},  # torchrun under srun
    ],
)
def test_a_process_that_srun_did_not_start_among_others_is_left_alone(changed: dict[str, str]) -> None:
    assert srun_variables(STEP | changed) == {}


def test_a_batch_script_is_no_task_of_srun() -> None:
    script = {"SLURM_JOB_ID": "1", "SLURM_NTASKS": "8", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
    assert srun_variables(script) == {}


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("localhost", "localhost"),
        ("gpu[003-007,012],login", "gpu003"),
        ("gpu[9,11]", "gpu9"),
        ("a1,b[2-3]", "a1"),
        ("rack[1-2]node[05-06]", "rack1node05"),
    ],
)
def test_the_first_host_of_a_list(nodes: str, first: str) -> None:
    assert first_host(nodes) == first


def test_tasks_of_each_node() -> None:
    assert tasks_per_node("8(x2),4") == [8, 8, 4]
    assert tasks_per_node("") == []


def test_the_script_asks_for_every_rank_and_runs_the_same_command(planned: PlannedCommand) -> None:
    layout = ["launch=slurm", "launch.nnodes=2", "launch.nproc=8", "parallel=fsdp", "hardware=h100"]
    asked = ["launch.partition=gpu", "launch.time=2-00:00:00", "launch.sbatch=--mem=0 --exclusive"]
    job = planned.run(*layout, *asked, "train.global_batch_size=16", "run.dir=my run").job
    assert job.plan.world_size == 16
    lines = batch_script(job).splitlines()
    for option in ("nodes=2", "ntasks-per-node=8", "gpus-per-node=8", "partition=gpu", "time=2-00:00:00"):
        assert f"#SBATCH --{option}" in lines
    assert {"#SBATCH --mem=0 --exclusive", "#SBATCH --signal=TERM@300"} <= set(lines)
    resumed, begun = [line.strip() for line in lines if line.strip().startswith("program=(/")]
    assert begun.count("my run") == 1
    assert "launch=slurm" in begun
    assert "resume=" in resumed
    assert "launch=slurm" not in resumed  # the run keeps it
    assert not [line for line in lines if "requeue" in line and line.startswith("#SBATCH")]


class Batch:
    """The script of launch=slurm under a srun that ends as it is told."""

    def __init__(self, planned: PlannedCommand, folder: Path, *arguments: str) -> None:
        self.folder, self.run_dir = folder, folder / "my run"
        layout = [
            "launch=slurm",
            "launch.nproc=2",
            "parallel=fsdp",
            "hardware=cpu",
            f"run.dir={self.run_dir}",
        ]
        self.job = planned.run(*layout, "train.stop_after=7", *arguments).job
        self.job.run_dir = self.run_dir
        self.run_dir.mkdir()
        (folder / "batch.sh").write_text(batch_script(self.job))
        self.bin = folder / "bin"
        self.bin.mkdir()
        self._install("scontrol", f"echo scontrol $@ >> '{folder}/log'")

    def _install(self, name: str, body: str) -> None:
        (self.bin / name).write_text(f"#!/bin/bash\n{body}\n")
        (self.bin / name).chmod(0o755)

    def run(self, srun: str) -> tuple[int, list[str]]:
        """Run the script with `srun` as a script of bash; return exit code and what the programs logged."""
        own = f"""
log() {{ echo "$@" >> '{self.folder}/log'; }}
log srun "${{@: -1}}"
run='{self.run_dir}'
begun() {{ touch "$run/config.yaml"; mkdir -p "$run/checkpoints/step-$1"; }}
count=$(grep -c '^srun' '{self.folder}/log')
{srun}
"""
        self._install("srun", own)
        environment = {"PATH": f"{self.bin}:/usr/bin:/bin", "SLURM_JOB_ID": "4242"}
        done = subprocess.run(
            ["bash", self.folder / "batch.sh"], env=environment, capture_output=True, timeout=60
        )
        log = (self.folder / "log").read_text().splitlines()
        (self.folder / "log").unlink()
        return done.returncode, [line.replace(f"'{self.run_dir}'", "RUN") for line in log]


@pytest.fixture
def batch(planned: PlannedCommand, tmp_path: Path) -> Callable[..., Batch]:
    return lambda *arguments: Batch(planned, tmp_path, *arguments)


FIRST, AGAIN = "srun run.dir=RUN", "srun resume=RUN"


def test_a_job_that_comes_back_from_the_queue_resumes_its_run(batch: Callable[..., Batch]) -> None:
    script = batch()
    assert script.run("begun 3; exit 0") == (0, [FIRST])
    assert script.run("exit 0") == (0, [AGAIN])
    resumed = next(line for line in batch_script(script.job).splitlines() if "resume=" in line)
    assert "train.stop_after=7" in resumed  # counts for this command, which the job still is


def test_the_script_restarts_ranks_that_died_while_checkpoints_come(batch: Callable[..., Batch]) -> None:
    script = batch("launch.max_restarts=2")
    # Killed, then failing twice after a checkpoint each, then in vain until no restart is left.
    dying = "[ $count -le 3 ] && begun $((10 * count)); [ $count = 1 ] && kill -9 $$; exit 1"
    assert script.run(dying) == (1, [FIRST, AGAIN, AGAIN, AGAIN, AGAIN])
    assert batch_script(script.job).count("-gt 2 ]") == 1


@pytest.mark.parametrize("code", [0, 2, 75, 130])
def test_the_script_restarts_nothing_that_has_ended_by_itself(code: int, batch: Callable[..., Batch]) -> None:
    assert batch("launch.max_restarts=2", "launch.requeue=true").run(f"begun 3; exit {code}") == (
        code,
        [FIRST],
    )


def test_the_script_does_not_repeat_what_would_end_alike(batch: Callable[..., Batch]) -> None:
    entry = (
        """begun 3; echo '{"kind": "over", "step": 3, "reason": "why"}' > "$run/accidents.jsonl"; exit 1"""
    )
    assert batch("launch.max_restarts=2").run(entry) == (1, [FIRST])


# srun hands SIGTERM to its ranks, which save and exit with 75.
SAVING = (
    """trap 'log saved; exit 75' TERM; begun 3; kill -{} $PPID; for i in {{1..200}}; do sleep 0.05; done"""
)


def test_near_the_time_limit_the_ranks_save_and_the_job_goes_back_into_the_queue(
    batch: Callable[..., Batch],
) -> None:
    script = batch("launch.requeue=true", "launch.max_restarts=2")
    options = {line for line in batch_script(script.job).splitlines() if line.startswith("#SBATCH")}
    assert options >= {"#SBATCH --requeue", "#SBATCH --open-mode=append", "#SBATCH --signal=B:USR2@300"}
    assert script.run(SAVING.format("USR2")) == (75, [FIRST, "saved", "scontrol requeue 4242"])


def test_a_preempted_job_waits_for_its_ranks_and_leaves_the_queue_to_slurm(
    batch: Callable[..., Batch],
) -> None:
    """Slurm sends SIGTERM to this shell and to the ranks, which the shell must outlive."""
    both = SAVING.format("TERM").replace("for i", "kill -TERM $$; for i")
    assert batch("launch.requeue=true").run(both) == (75, [FIRST, "saved"])


def test_ranks_for_which_the_grace_period_was_too_short_are_not_started_again(
    batch: Callable[..., Batch],
) -> None:
    script = batch("launch.max_restarts=2")
    assert script.run("kill -TERM $PPID; sleep 0.2; kill -9 $$") == (137, [FIRST])


def test_without_sbatch_or_a_partition_the_user_is_told(command_line: CommandLine, tmp_path: Path) -> None:
    arguments = [*command_line.training(tmp_path / "run"), "launch=slurm"]
    command_line.environment["PATH"] = str(tmp_path / "empty")
    ended = command_line.run(*arguments)
    assert ended.code == 2
    assert "no sbatch here" in ended.err
    stubs.install(tmp_path / "bin")
    command_line.environment["PATH"] = f"{tmp_path / 'bin'}:/usr/bin:/bin"
    refused = command_line.run(*arguments, "launch.partition=full")
    assert refused.code == 1
    assert "invalid partition" in refused.err


def test_launch_slurm_submits_a_job_whose_ranks_srun_starts(
    command_line: CommandLine, tmp_path: Path
) -> None:
    stubs.install(tmp_path / "bin")
    command_line.environment["PATH"] = f"{tmp_path / 'bin'}:/usr/bin:/bin"
    run_dir = tmp_path / "my run, it's $HOME"
    layout = ["launch=slurm", "launch.nproc=2", "parallel=fsdp"]
    submitted = command_line.run(*command_line.training(run_dir, "train.steps=2", *layout))
    assert submitted.code == 0, submitted.err
    assert submitted.out == f"submitted job 4242; its output: {run_dir}/slurm-4242.log\n"
    until(lambda: (run_dir / "loss.png").exists())
    assert [row["step"] for row in rows(run_dir)] == [1, 2]
    assert '"world_size": 2' in (run_dir / "environment.json").read_text()
