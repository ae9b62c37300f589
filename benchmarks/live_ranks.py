"""Bytes of one rank at the fullest moment of a real step, on any layout, beside what the plan counts.

A case is one rank of a small world over PyTorch's fake process group: plan, mesh, model, optimizer and steps
are those of the training task, and PyTorch's CPU allocator tells what it has handed out, state and kernels'
buffers included. A fake group has no threads that keep buffers for a while; what arrives from other ranks is
whatever its buffers held, which changes numbers and no sizes. Each case is a process of its own.

    python -m benchmarks.live_ranks                every case; writes live_memory.json and docs/planning.md
    python -m benchmarks.live_ranks --only pp      the cases that hold this text, printed alone
"""

import argparse
import json
import multiprocessing
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.autograd.profiler import profile, record_function
from torch.distributed.pipelining import PipelineStage

from benchmarks.live_memory import RESULT
from benchmarks.live_shapes import WEIGHTS, added, measure_shape
from benchmarks.pages import fill
from dsv3.data.batch import Batch
from dsv3.launch.job import plan_job
from dsv3.parallel.mesh import assign_data_shard
from dsv3.planning.memory import MemoryBytes, pipeline_memory
from dsv3.training.optimizer import build_optimizer
from dsv3.training.step import TrainStep
from tests.harness.composing import strict_config
from tests.parallel.fake_world import RANKS_PER_NODE, fake_rank, start

MIB = 2**20
SECOND_STEP = "the second step begins"


@dataclass(frozen=True)
class RankCase:
    """One rank of a world, and what the command line says of the model, the layout and the step."""

    world: int
    rank: int
    overrides: str

    @property
    def command(self) -> list[str]:
        """Return the words of its command line; nodes are those of tests/parallel/fake_world.py."""
        node = min(self.world, RANKS_PER_NODE)
        launch = [f"launch.nproc={node}"]
        if self.world > node:
            launch += [f"launch.nnodes={self.world // node}", f"launch.node_rank={self.rank // node}"]
            launch.append("launch.rendezvous=localhost:29500")
        return [*self.overrides.split(), *launch]


def rank_cases() -> list[RankCase]:
    """Return layouts, recomputation, precisions and numbers of microbatches, each with others of the rest."""
    one = [
        "precision=fp32 recompute=none train.microbatch_size=4 train.global_batch_size=8",
        "precision=bf16 recompute=selective train.microbatch_size=4 train.global_batch_size=8",
        "precision=bf16 recompute=full train.microbatch_size=8 train.global_batch_size=8",
    ]
    sharded = [
        (2, "fsdp precision=bf16 recompute=none train.microbatch_size=4 train.global_batch_size=16"),
        (4, "fsdp precision=fp32 recompute=full train.microbatch_size=4 train.global_batch_size=16"),
        (4, "hsdp precision=bf16 recompute=selective train.microbatch_size=4 train.global_batch_size=32"),
        (4, "tp_ep precision=bf16 recompute=none train.microbatch_size=4 train.global_batch_size=16"),
        (4, "tp_ep precision=fp32 recompute=full train.microbatch_size=8 train.global_batch_size=16"),
        (4, "cp precision=bf16 recompute=none train.microbatch_size=4 train.global_batch_size=8"),
    ]
    deep = "pp parallel.degrees.pp=4 train.microbatch_size=1 train.global_batch_size=8 model.num_layers=8"
    two = "pp parallel.degrees.pp=2 train.microbatch_size=2 train.global_batch_size=8"
    stages = [
        (2, f"{two} precision=fp32 recompute=full"),
        (4, f"{deep} precision=bf16 recompute=none parallel.schedule=1F1B"),
        (4, f"{deep} precision=bf16 recompute=selective parallel.schedule=Interleaved1F1B"),
        (4, f"{deep} precision=bf16 recompute=none parallel.schedule=ZBVZeroBubble"),
        (4, f"{deep} precision=bf16 recompute=none parallel.schedule=DualPipeV"),
        (16, "full precision=bf16 recompute=none train.microbatch_size=2 train.global_batch_size=16"),
    ]
    size = "model=debug train.sequence_length=256"
    return [
        *(RankCase(1, 0, f"{size} {case}") for case in one),
        *(RankCase(world, 0, f"{size} parallel={case}") for world, case in sharded),
        *(
            RankCase(world, end, f"{size} parallel={case}")
            for world, case in stages
            for end in (0, world - 1)
        ),
    ]


def shape_cases() -> list[RankCase]:
    """Return cases with layers of the real sizes, for benchmarks/live_shapes.py."""
    small = "model=16b model.num_layers=6 train.sequence_length=4096 parallel=fsdp precision=bf16"
    large = "model=671b model.num_layers=5 model.num_dense_layers=2 train.sequence_length=4096 precision=bf16"
    two = "train.microbatch_size=2 train.global_batch_size=32"
    return [
        RankCase(8, 0, f"{small} recompute=full {two}"),
        RankCase(8, 0, f"{small} parallel.degrees.ep=8 recompute=selective {two}"),
        *(
            RankCase(64, 0, f"{large} parallel=fsdp parallel.degrees.ep=64 recompute={recompute} "
                            "train.microbatch_size=1 train.global_batch_size=128")
            for recompute in ("none", "full")
        ),
    ]  # fmt: skip


@dataclass
class RankMeasured:
    """Bytes of a rank: as the allocator told them, and as planned."""

    live: int
    """At the fullest moment of the second step."""
    before: int
    """Before it: parameters, optimizer state, and what the model and the batch need besides."""
    planned: int
    state: int
    """Part of `planned`: parameters and optimizer state."""

    @property
    def ratio(self) -> float:
        """Planned over live."""
        return self.planned / self.live

    @property
    def step_ratio(self) -> float:
        """Planned over live, both without what is there before the step."""
        return (self.planned - self.state) / (self.live - self.before)


def measure_rank(case: RankCase) -> RankMeasured:
    """Take two steps in this process, and plan them."""
    torch.set_num_threads(1)
    with profile(profile_memory=True, use_kineto=True) as profiler:
        planned = _steps(case, case.command)
    assert profiler.kineto_results is not None
    events = profiler.kineto_results.events()
    begin = max(event.start_ns() for event in events if event.name() == SECOND_STEP)
    now = before = live = 0
    for at, bytes_ in sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"):
        now += bytes_
        before = now if at < begin else before
        live = max(live, now if at >= begin else 0)
    return RankMeasured(
        live, before, planned.total - planned.save_copies, planned.parameters + planned.optimizer
    )


def _steps(case: RankCase, overrides: list[str]) -> MemoryBytes:
    with fake_rank(case.rank, case.world) as ranks, _agreed_stages():
        model = start(overrides, ranks, lambda _: None)
        job = plan_job(strict_config(overrides), overrides)
        config, plan = job.config, job.plan
        optimizer = build_optimizer(config.optimizer, model.model_parts, config.precision.moments)
        ranks = assign_data_shard(ranks, model.mesh) if model.mesh else ranks
        step = TrainStep(model.forward_backward, optimizer, ranks, config.train.clip_norm)
        step(batches := _batches(config, plan.shape.microbatches), WEIGHTS)
        with record_function(SECOND_STEP):
            pass
        step(batches, WEIGHTS)
    stage = case.rank // (case.world // plan.degrees.pp)
    return pipeline_memory(config.model, plan.degrees, plan.shape)[stage]


def _batches(config: Any, count: int) -> list[Batch]:
    shape = (config.train.microbatch, config.train.length)
    tokens = [torch.randint(0, config.model.vocab_size, shape) for _ in range(count)]
    return [Batch(each, each.roll(-1, 1), torch.zeros(shape, dtype=torch.int32)) for each in tokens]


@contextmanager
def _agreed_stages() -> Iterator[None]:
    """Let a pipeline's ranks agree that shapes are known: in a fake group their votes do not arrive."""

    def agreed(*_: object, **__: object) -> Tensor:
        return torch.ones(1, dtype=torch.int32)

    with (
        mock.patch.object(PipelineStage, "_warmup_forward_vote", agreed),
        mock.patch.object(PipelineStage, "_warmup_backward_result", agreed),
    ):
        yield


def measure_fake(case: RankCase) -> RankMeasured:
    """Take a step with fake tensors; parameters and optimizer state are taken as planned."""
    live, plan, config = measure_shape(case.world, case.rank, case.command, _batches)
    memory = pipeline_memory(config.model, plan.degrees, plan.shape)[0]
    state = memory.parameters + memory.optimizer
    return RankMeasured(live + state, state, state + added(memory), state)


HEAD = [
    "| model | layout | ranks | dtype | recompute | batches | rank | MiB | planned | ratio | step alone |",
    f"|{'---|' * 11}",
]


def row(case: RankCase, found: RankMeasured) -> str:
    """Return a row of the table; its last column leaves out what is there before the step."""
    keys = dict(word.split("=", 1) for word in case.overrides.split())
    layout = keys.get("parallel", "none")
    layout += f" {keys['parallel.schedule']}" if "parallel.schedule" in keys else ""
    microbatches = plan_job(strict_config(case.command), case.command).plan.shape.microbatches
    if "parallel.degrees.ep" in keys:
        layout += f" ep={keys['parallel.degrees.ep']}"
    name = keys["model"] + (f", {keys['model.num_layers']} layers" if "model.num_layers" in keys else "")
    cells = [name, layout, case.world, keys["precision"], keys["recompute"], microbatches, case.rank]
    cells += [f"{found.live / MIB:.1f}", f"{found.planned / MIB:.1f}"]
    cells += [f"{found.ratio:.3f}", f"{found.step_ratio:.3f}"]
    return f"| {' | '.join(map(str, cells))} |"


def main() -> None:
    """Measure the cases and print the table; of all of them write JSON and the page too."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--only", default="", help="cases that hold this text")
    given = parser.parse_args()
    cases = [(case, measure_rank) for case in rank_cases()] + [(case, measure_fake) for case in shape_cases()]
    lines, rows = list(HEAD), []
    print("\n".join(HEAD))
    with multiprocessing.get_context("fork").Pool(1, maxtasksperchild=1) as pool:
        for case, measured in cases:
            if given.only not in case.overrides:
                continue
            found = pool.apply(measured, [case])
            lines.append(row(case, found))
            print(lines[-1], flush=True)
            rows.append({**vars(case), **vars(found), "ratio": round(found.ratio, 3)})
    if not given.only:
        stored = json.loads(RESULT.read_text())
        RESULT.write_text(json.dumps({**stored, "ranks": rows}, indent=2) + "\n")
        fill("planning.md", "live", lines)


if __name__ == "__main__":
    main()
