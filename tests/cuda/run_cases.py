"""Take training steps of cases on the CPU and on a simulated GPU; the results go to a JSON file.

    python -m tests.cuda.run_cases RESULTS CASE...

Besides cases it knows the checks of self_checks.py and program.py by their names. conftest.py starts it once
per session. torch is imported once; each rank of each case is a fork of this process, made before any thread
runs, so that a case that fails or hangs takes no other along.
"""

import faulthandler
import gc
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

from dsv3.distributed.garbage import collect_rarely
from tests.cuda.library import load_library

STEPS = 2
"""The first step fills caches; host waits are counted in the last."""

PATIENCE = 240.0
"""Seconds after which a case has failed."""


def take_steps(config: Any, ranks: int, rank: int, device: Any) -> list[float]:
    """Take STEPS steps of the configured model on `device`; return their losses and gradient norms.

    The ledger has the last step afterwards.
    """
    import numpy as np

    from dsv3.checkpoint.run_statistics import RunStatistics
    from dsv3.data.batch import collate
    from dsv3.data.packing import PADDING, PackedRow
    from dsv3.distributed.process_group import RankContext, make_deterministic
    from dsv3.parallel.mesh import ParallelMesh, assign_data_shard
    from dsv3.parallel.parallel_model import build_parallel_model
    from dsv3.planning.layout import fill_auto_degrees
    from dsv3.training.optimizer import build_optimizer
    from dsv3.training.schedule import StepHyperparameters
    from dsv3.training.step import TrainStep
    from dsv3.training.step_guard import StepGuard
    from tests.cuda.cases import ROWS, SEQUENCE, VOCAB
    from tests.cuda.ledger import LEDGER

    make_deterministic(config.train.deterministic and device.type == "cuda", seed=1)
    mesh = None
    if ranks > 1:
        mesh = ParallelMesh(fill_auto_degrees(config.parallel, ranks, config.model, SEQUENCE), device.type)
    context = assign_data_shard(RankContext(rank, rank, ranks, device), mesh)
    model = build_parallel_model(config, mesh, device)
    optimizer = build_optimizer(config.optimizer, model.model_parts, config.precision.moments)
    guard = StepGuard(config.train.accidents, RunStatistics(), device, optimizer)
    step = TrainStep(model.forward_backward, optimizer, context, 1.0, guard)
    hyperparameters = StepHyperparameters(
        lr=1e-3, mtp_weight=0.3, balance_weight=1e-3, bias_speed=1e-2, z_loss_weight=1e-3
    )
    draw = np.random.default_rng(0)
    documents = np.repeat(np.arange(3), [SEQUENCE // 2, SEQUENCE // 4, SEQUENCE // 4 + 1]).astype(np.int32)
    # The host waits no more for a row with padding than for a full one.
    padded = np.where(documents == documents[-1], PADDING, documents)
    kinds = [documents, padded]
    rows = [PackedRow(draw.integers(0, VOCAB, SEQUENCE + 1), kinds[n % 2]) for n in range(ROWS)]
    own = rows[context.data_rank :: context.data_world]
    metrics = []
    for _ in range(STEPS):
        LEDGER.clear()
        metrics.append(step([collate([row]) for row in own], hyperparameters))
    counted = LEDGER.snapshot()
    found = [value.item() for one in metrics for value in (one.loss, one.grad_norm)]
    LEDGER.restore(counted)
    return found


def run_check(name: str) -> dict[str, Any]:
    """Run one of the simulator's checks of itself; return nothing, or the error."""
    from tests.cuda import program, self_checks

    try:
        faulthandler.dump_traceback_later(PATIENCE - 10)
        (self_checks.CHECKS | program.CHECKS)[name]()
    except Exception:
        return {"error": traceback.format_exc(limit=-8)}
    return {}


def run_rank(name: str, config: Any, rank: int, store: str) -> dict[str, Any]:
    """Run one rank of a case; return the ledger and its losses, also those of the CPU, or the error."""
    import torch
    import torch.distributed as dist

    from tests.cuda.cases import CASES
    from tests.cuda.ledger import LEDGER
    from tests.cuda.runtime import set_gpu

    if name not in CASES:
        return run_check(name)
    ranks = CASES[name].ranks
    try:
        if ranks > 1:
            address = f"file://{store}/{name}"
            dist.init_process_group("cpu:gloo,cuda:gloo", init_method=address, rank=rank, world_size=ranks)
        set_gpu(rank)
        alone = CASES[name].reference is None
        plain = take_steps(config, ranks, rank, torch.device("cpu")) if alone else None
        found = take_steps(config, ranks, rank, torch.device("cuda", rank))
    except Exception:
        return {"error": f"rank {rank}: {traceback.format_exc(limit=-12)}"}
    counts = {"waits": LEDGER.waits, "kernels": LEDGER.kernels, "launches": LEDGER.launches.total()}
    return {"expected": plain, "found": found, **counts}


def run_case(name: str, store: str) -> dict[str, Any]:
    """Run a case in one fork per rank; return rank 0's result, or the first error of any rank."""
    from dsv3.config.strict import strict
    from tests.cuda.cases import BASE, CASES
    from tests.harness.composing import compose

    case = CASES.get(name)
    ranks = case.ranks if case else 1
    config = strict(compose([*BASE, *case.overrides])) if case else None
    children: dict[int, int] = {}
    for rank in range(ranks):
        child = os.fork()
        if child == 0:
            faulthandler.enable()
            Path(store, f"{name}-{rank}.json").write_text(json.dumps(run_rank(name, config, rank, store)))
            os._exit(0)  # not through Python's end, which would wait for collectives of a rank that failed
        children[child] = rank
    results: dict[int, dict[str, Any]] = {}
    seconds = 0.0
    deadline = time.monotonic() + PATIENCE
    while children and time.monotonic() < deadline and not any("error" in one for one in results.values()):
        child, status, used = os.wait4(-1, os.WNOHANG)
        if child == 0:
            time.sleep(0.01)
            continue
        rank = children.pop(child)
        seconds += used.ru_utime + used.ru_stime
        path = Path(store, f"{name}-{rank}.json")
        died = {"error": f"rank {rank} died, status {status}"}
        results[rank] = json.loads(path.read_text()) if path.exists() else died
    for child, rank in children.items():
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        results.setdefault(rank, {"error": f"rank {rank} was still running"})
    result = next((one for one in results.values() if "error" in one), results[0])
    return {**result, "cpu_seconds": round(seconds, 2)}


def main(target: Path, names: list[str]) -> None:
    """Run the cases and write their results."""
    load_library()
    collect_rarely()
    import torch

    from tests.cuda.runtime import install

    torch.set_num_threads(1)
    install()  # before dsv3, which copies what PyTorch knows of attention kernels
    for module in ("dsv3.parallel.parallel_model", "dsv3.training.step", "tests.harness.composing"):
        importlib.import_module(module)  # once for all forks
    gc.freeze()
    with tempfile.TemporaryDirectory() as store:
        found = {name: run_case(name, store) for name in names}
    target.write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
