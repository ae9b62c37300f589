"""hardware= decides where a job runs: hardware=cpu leaves GPUs alone, a GPU that is not here is refused."""

from pathlib import Path
from typing import Any

import pytest
import torch

from dsv3.distributed.process_group import RankContext, join_process_group
from tests.convert.releases import small_model, write_release
from tests.harness.commands import PlannedCommand, TrainCommand
from tests.harness.tiny import MODEL, TRAINING

pytestmark = pytest.mark.slow

H100S = "NVIDIA H100 80GB HBM3, 81559\n" * 8


@pytest.fixture
def gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine that says it has eight H100: the file that its nvidia-smi prints. torch finds no driver."""
    told, program = tmp_path / "told", tmp_path / "bin" / "nvidia-smi"
    program.parent.mkdir()
    told.write_text(H100S)
    program.write_text(f"#!/bin/sh\ncat {told}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:/usr/bin:/bin")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    return told


def test_the_device_of_a_rank_is_the_gpu_unless_the_cpu_was_chosen(
    here: Path, gpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen: list[Any] = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setenv("LOCAL_RANK", "3")
    with join_process_group(1) as ranks:
        assert (ranks.device.type, chosen) == ("cuda", [torch.device("cuda", 3)])
    with join_process_group(1, on_cpu=True) as ranks:
        assert (ranks.device.type, len(chosen)) == ("cpu", 1)


def test_a_gpu_that_nvidia_smi_does_not_show_is_not_trained_on_by_the_plan_of_a_cpu(
    commands: TrainCommand, gpus: Path
) -> None:
    (gpus.parent / "bin" / "nvidia-smi").unlink()
    outcome = commands.run(*MODEL, *TRAINING, "run.dir=new", "train.steps=1")
    assert outcome.code == 2
    assert "hardware=auto asks nvidia-smi, which shows no GPU here, and PyTorch finds one" in outcome.err
    assert "hardware=h100" in outcome.err
    assert not Path("new").exists()


@pytest.mark.parametrize(("on_cpu", "backend"), [(True, "gloo"), (False, "nccl")])
def test_ranks_on_the_cpu_of_a_machine_with_gpus_talk_through_gloo(
    here: Path, gpus: Path, monkeypatch: pytest.MonkeyPatch, on_cpu: bool, backend: str
) -> None:
    asked: list[str] = []
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr("torch.distributed.init_process_group", lambda backend, **_: asked.append(backend))
    monkeypatch.setattr("dsv3.distributed.process_group.connect_to_store", lambda name: None)
    with join_process_group(1, on_cpu):
        assert asked == [backend]


def test_every_task_runs_on_the_cpu_of_a_machine_with_gpus(
    commands: TrainCommand, gpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A task that touched CUDA would fail: torch has none here, whatever is_available says."""
    devices: list[str] = []
    unwatched = RankContext.__init__

    def watched(self: RankContext, rank: int, local_rank: int, world: int, device: Any, **rest: Any) -> None:
        devices.append(device.type)
        unwatched(self, rank, local_rank, world, device, **rest)

    monkeypatch.setattr(RankContext, "__init__", watched)
    run, released = tmp_path / "run", tmp_path / "released"
    commands.train(run, "hardware=cpu", "train.steps=1")
    commands.must("task=evaluate", "hardware=cpu", f"checkpoint.load={run}")
    commands.must("task=generate", "hardware=cpu", f"checkpoint.load={run}", "task.max_tokens=1")
    # A prompt and as many tokens as fit alone do not fit together, which takes the tokenizer to know.
    room = ["task=generate", "hardware=cpu", "hardware.memory_bytes=10000000", f"checkpoint.load={run}"]
    refused = commands.run(*room, "task.max_tokens=1000000")
    assert (refused.code, "the KV cache of 1,000,000 tokens does not fit" in refused.err) == (2, True)
    fitting = int(refused.err.split("together may have ")[1].split()[0].replace(",", ""))
    refused = commands.run(*room, f"task.max_tokens={fitting}", "task.prompt=a")
    assert (refused.code, f"together may have {fitting:,} tokens" in refused.err) == (2, True)
    assert f"the KV cache of {fitting:,} tokens" not in refused.err
    write_release(released, small_model(), "bf16")
    commands.must("task=verify", "hardware=cpu", "model=hf", f"model.path={released}")
    assert len(devices) >= 4
    assert set(devices) == {"cpu"}
    environment = (run / "environment.json").read_text()
    assert '"name": "cpu"' in environment


def test_gpus_set_no_world_where_the_cpu_was_chosen(planned: PlannedCommand, gpus: Path) -> None:
    assert planned.run("parallel=fsdp").job.plan.world_size == 8
    job = planned.run("parallel=fsdp", "hardware=cpu").job
    assert (job.plan.world_size, job.hardware.name) == (2, "cpu")
    assert planned.run("parallel=fsdp", "hardware=cpu", "launch.nproc=16").job.plan.world_size == 16


def test_a_gpu_that_is_not_here_is_refused_before_anything_starts(
    commands: TrainCommand, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    commands.train(run, "train.steps=1")
    load = f"checkpoint.load={run}"
    typed = {"train": [*MODEL, *TRAINING, "run.dir=new"], "evaluate": [load], "generate": [load]}
    for task, arguments in (typed | {"verify": [*MODEL, "task.path=x"]}).items():
        outcome = commands.run(f"task={task}", "hardware=h100", *arguments)
        assert outcome.code == 2, outcome.err
        assert "hardware.name=h100, and nvidia-smi shows no GPU here" in outcome.err
    assert not list(Path.cwd().iterdir())


def test_what_the_refusal_names_works(commands: TrainCommand, planned: PlannedCommand) -> None:
    assert planned.run("task=plan", "hardware=h100").job.hardware.name == "h100"
    commands.train(Path("run"), "hardware=auto", "train.steps=1")


def test_another_gpu_than_the_one_named_is_told(planned: PlannedCommand, gpus: Path) -> None:
    assert not [note for note in planned.run("hardware=h100").job.notes if "hardware" in note]
    gpus.write_text("NVIDIA A100-SXM4-80GB, 81920\n")
    (note,) = [note for note in planned.run("hardware=h100").job.notes if "hardware" in note]
    assert "NVIDIA A100-SXM4-80GB" in note
    assert "h100" in note
    assert not [note for note in planned.run("hardware=auto").job.notes if "hardware" in note]
