"""Real training steps of any layout on CPU, in processes of their own: their seconds and their bytes.

A case is a list of overrides, as train.py takes them, and a number of ranks. Its processes go the way of the
training task (plan, mesh, model, optimizer, step) on random tokens. The bytes are those that PyTorch's CPU
allocator has handed out at the fullest moment of a step, kernels' buffers included; what a kernel's library
takes from elsewhere is not seen.

    python -m benchmarks.real_steps --ranks 2 parallel=fsdp model=debug
"""

import argparse
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


def run(overrides: Sequence[str], ranks: int, steps: int, memory: bool, **environment: str) -> dict[str, Any]:
    """Run a case; return what its ranks told: those of the first, and the most of `allocated` over all."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "benchmarks.real_steps", "--rank-of", str(ranks), "--steps", str(steps)]
    command += ["--memory"] * memory + list(overrides)
    started = []
    for rank in range(ranks):
        own: dict[str, object] = {
            "RANK": rank,
            "LOCAL_RANK": rank,
            "WORLD_SIZE": ranks,
            "LOCAL_WORLD_SIZE": ranks,
        }
        own |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        variables = os.environ | environment | ({k: str(v) for k, v in own.items()} if ranks > 1 else {})
        started.append(
            subprocess.Popen(
                command, cwd=ROOT, env=variables | {"DSV3_PROGRESS": "off"}, text=True,
                stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            )
        )  # fmt: skip
    outputs = [process.communicate() for process in started]
    if any(process.returncode for process in started):
        raise SystemExit(f"{' '.join(overrides)}\n" + "\n".join(err[-2000:] for _, err in outputs))
    told: list[dict[str, Any]] = [json.loads(out.splitlines()[-1]) for out, _ in outputs]
    fullest = max(told, key=lambda one: one.get("allocated", 0))
    return told[0] | {key: fullest[key] for key in ("allocated",) if key in fullest}


def measure(overrides: list[str], steps: int, memory: bool) -> dict[str, Any]:
    """Take steps in this process, one of the ranks that the environment tells of."""
    import torch

    from dsv3.data.batch import Batch
    from dsv3.launch.job import plan_job
    from dsv3.parallel.mesh import assign_data_shard
    from dsv3.tasks.setup import build_mesh, join_ranks, load_parts
    from dsv3.training.optimizer import build_optimizer
    from dsv3.training.schedule import StepHyperparameters
    from dsv3.training.step import TrainStep
    from tests.harness.composing import strict_config

    job = plan_job(strict_config(overrides), overrides)
    config, plan = job.config, job.plan
    counter = AllocatedBytes() if memory else None
    with join_ranks(job) as ranks:
        mesh = build_mesh(job, ranks)
        model = load_parts(config, mesh, ranks)
        optimizer = build_optimizer(config.optimizer, model.model_parts, config.precision.moments)
        ranks = assign_data_shard(ranks, mesh)
        step = TrainStep(model.forward_backward, optimizer, ranks, config.train.clip_norm)
        generator = torch.Generator().manual_seed(ranks.data_rank)
        rows, length = config.train.microbatch, config.train.length
        batches = []
        for _ in range(plan.shape.microbatches):
            tokens = torch.randint(0, config.model.vocab_size, (rows, length), generator=generator)
            batches.append(Batch(tokens, tokens.roll(-1, 1), torch.zeros(rows, length, dtype=torch.int32)))
        weights = StepHyperparameters(1e-4, 0.3, 1e-4, 0.001)
        taken = []
        for number in range(2 + steps):
            ranks.meet()
            begin = time.perf_counter()
            step(batches, weights).loss.item()
            if number >= 2:
                taken.append(time.perf_counter() - begin)
        told: dict[str, Any] = {"seconds": median(taken), "steps": taken, "threads": torch.get_num_threads()}
        if counter is not None:
            told |= {
                "allocated": counter.stop(),
                "planned_bytes": plan.memory.total - plan.memory.save_copies,
            }
        if plan.time is not None:
            causes = {cause.name: seconds for cause, seconds in plan.time.causes.items() if seconds}
            told |= {"planned": plan.time.seconds, "causes": causes, "source": plan.time.source}
    return told


class AllocatedBytes:
    """Follows PyTorch's CPU allocator from now on, by the profiler's events."""

    def __init__(self) -> None:
        from torch.autograd.profiler import profile

        # Only this thread is seen: over several ranks, what gloo's threads free seems to stay.
        self.profiler = profile(profile_memory=True, use_kineto=True)
        self.profiler.__enter__()

    def stop(self) -> int:
        """Return the most bytes that were in use at once since the start."""
        self.profiler.__exit__(None, None, None)
        results = self.profiler.kineto_results
        assert results is not None
        now = most = 0
        events: list[Any] = [event for event in results.events() if event.name() == "[memory]"]
        changes = sorted((event.start_ns(), event.nbytes()) for event in events)
        for _, bytes_ in changes:
            now += bytes_
            most = max(most, now)
        return most


def main() -> None:
    """Run one case and print what it told, or be one of its ranks."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--memory", action="store_true", help="also count bytes, which slows the steps down")
    parser.add_argument("--rank-of", type=int, help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*")
    given = parser.parse_args()
    if given.rank_of:
        print(json.dumps(measure(given.overrides, given.steps, given.memory)))
    else:
        print(json.dumps(run(given.overrides, given.ranks, given.steps, given.memory), indent=1))


if __name__ == "__main__":
    main()
