"""Take training steps of cases on the CPU and on a simulated GPU; the results go to a JSON file.

    python -m tests.cuda.run_cases RESULTS CASE...

conftest.py starts it once per session. torch is imported once; each rank of each case is a fork of this process,
made before any thread runs, so that a case that fails or hangs takes no other along.
"""

import faulthandler
import importlib
import json
import os
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

from tests.cuda.library import load_library

STEPS = 2
"""The first step fills caches; host waits are counted in the last."""

PATIENCE = 90.0
"""Seconds after which a case has failed."""


def take_steps(name: str, rank: int, device: Any) -> list[float]:
    """Take STEPS steps of a case's model on `device`; return their losses and gradient norms.

    The ledger has the last step afterwards.
    """
    import numpy as np

    from dsv3.config.strict import strict
    from dsv3.data.batch import collate
    from dsv3.data.packing import PackedRow
    from dsv3.distributed.process_group import RankContext, make_deterministic
    from dsv3.parallel.mesh import ParallelMesh, assign_data_shard
    from dsv3.parallel.parallel_model import build_parallel_model
    from dsv3.planning.layout import fill_auto_degrees
    from dsv3.training.optimizer import build_optimizer
    from dsv3.training.schedule import StepHyperparameters
    from dsv3.training.step import TrainStep
    from tests.cuda.cases import BASE, CASES, ROWS, SEQUENCE, VOCAB
    from tests.cuda.ledger import LEDGER
    from tests.harness.composing import compose

    overrides, ranks = CASES[name]
    config = strict(compose([*BASE, *overrides]))
    make_deterministic(config.train.deterministic and device.type == "cuda", seed=1)
    mesh = None
    if ranks > 1:
        mesh = ParallelMesh(fill_auto_degrees(config.parallel, ranks, config.model, SEQUENCE), device.type)
    context = assign_data_shard(RankContext(rank, rank, ranks, device), mesh)
    model = build_parallel_model(config, mesh, device)
    optimizer = build_optimizer(config.optimizer, model.model_parts, config.precision.moments)
    step = TrainStep(model.forward_backward, optimizer, context, clip_norm=1.0)
    hyperparameters = StepHyperparameters(
        lr=1e-3, mtp_weight=0.3, balance_weight=1e-3, bias_speed=1e-2, z_loss_weight=1e-3
    )
    draw = np.random.default_rng(0)
    documents = np.repeat(np.arange(3), [SEQUENCE // 2, SEQUENCE // 4, SEQUENCE // 4 + 1]).astype(np.int32)
    rows = [PackedRow(draw.integers(0, VOCAB, SEQUENCE + 1), documents) for _ in range(ROWS)]
    own = rows[context.data_rank :: context.data_world]
    found = []
    for number in range(STEPS):
        if number:
            found += [metrics.loss.item(), metrics.grad_norm.item()]
        LEDGER.clear()
        metrics = step([collate([row]) for row in own], hyperparameters)
    counted = LEDGER.snapshot()
    found += [metrics.loss.item(), metrics.grad_norm.item()]
    LEDGER.restore(counted)
    return found


def run_rank(name: str, rank: int, ranks: int, store: str) -> dict[str, Any]:
    """Run one rank of a case; return its losses on both devices and the ledger, or the error."""
    import torch
    import torch.distributed as dist

    from tests.cuda.ledger import LEDGER, MEMORY
    from tests.cuda.runtime import set_gpu

    try:
        if ranks > 1:
            address = f"file://{store}/{name}"
            dist.init_process_group("cpu:gloo,cuda:gloo", init_method=address, rank=rank, world_size=ranks)
        set_gpu(rank)
        plain = take_steps(name, rank, torch.device("cpu"))
        found = take_steps(name, rank, torch.device("cuda", rank))
    except Exception:
        return {"error": f"rank {rank}: {traceback.format_exc(limit=-12)}"}
    counts = {"waits": LEDGER.waits, "kernels": LEDGER.kernels, "launches": LEDGER.launches.total()}
    return {"cpu": plain, "cuda": found, "peak": MEMORY.peak, **counts}


def run_case(name: str, ranks: int, store: str) -> dict[str, Any]:
    """Run a case in one fork per rank; return rank 0's result, or the first error of any rank."""
    children: dict[int, int] = {}
    for rank in range(ranks):
        child = os.fork()
        if child == 0:
            faulthandler.enable()
            Path(store, f"{name}-{rank}.json").write_text(json.dumps(run_rank(name, rank, ranks, store)))
            os._exit(0)  # not through Python's end, which would wait for collectives of a rank that failed
        children[child] = rank
    results: dict[int, dict[str, Any]] = {}
    deadline = time.monotonic() + PATIENCE
    while children and time.monotonic() < deadline and not any("error" in one for one in results.values()):
        child, status = os.waitpid(-1, os.WNOHANG)
        if child == 0:
            time.sleep(0.01)
            continue
        rank = children.pop(child)
        path = Path(store, f"{name}-{rank}.json")
        died = {"error": f"rank {rank} died, status {status}"}
        results[rank] = json.loads(path.read_text()) if path.exists() else died
    for child, rank in children.items():
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        results.setdefault(rank, {"error": f"rank {rank} was still running"})
    return next((one for one in results.values() if "error" in one), results[0])


def main(target: Path, names: list[str]) -> None:
    """Run the cases and write their results."""
    load_library()
    import torch

    from tests.cuda.cases import CASES
    from tests.cuda.runtime import install

    torch.set_num_threads(1)
    install()  # before dsv3, which copies what PyTorch knows of attention kernels
    for module in ("dsv3.parallel.parallel_model", "dsv3.training.step", "tests.harness.composing"):
        importlib.import_module(module)  # once for all forks
    with tempfile.TemporaryDirectory() as store:
        found = {name: run_case(name, CASES[name].ranks, store) for name in names}
    target.write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
