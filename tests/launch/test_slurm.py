"""srun's variables in torchrun's words, and the script that launch=slurm submits."""

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
    assert lines[-1].startswith("exec srun --kill-on-bad-exit=1 /")
    assert "launch=slurm" in lines[-1]
    assert lines[-1].count("my run") == 1


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
