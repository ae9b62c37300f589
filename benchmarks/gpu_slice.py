"""Train a slice of a model on one GPU: a few of its layers in full width, as one process holds them.

Prints and writes what it measures: tokens/s, MFU in both conventions, the share of the rate that large
matmuls reach on this machine, and peak memory beside the plan's. Weights are random, drawn on the device;
tokens are random, and routed as the router will. benchmarks/gpu.py runs it for several models and settings.

    python benchmarks/gpu_slice.py --model 16b --layers 8 --precision bf16
    python benchmarks/gpu_slice.py --model 16b --layers 4 --compile both
    python benchmarks/gpu_slice.py --model debug --sync-debug       # where the host waits for the GPU
    python benchmarks/gpu_slice.py --model 16b --layers 4 --peer    # beside HF transformers' model
"""

import argparse
import gc
import json
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from hydra import compose, initialize_config_dir
from torch import Tensor, nn

from dsv3.config.registry import CONF, register
from dsv3.config.root import Config
from dsv3.config.strict import strict
from dsv3.data.batch import Batch, collate
from dsv3.data.packing import PackedRow
from dsv3.distributed.process_group import RankContext
from dsv3.fp8.convert_model import fp8_engine_name
from dsv3.launch.job import Job, plan_job
from dsv3.parallel.parallel_model import build_parallel_model
from dsv3.planning.parameters import FlopsConvention, training_flops_per_token
from dsv3.training.optimizer import build_optimizer
from dsv3.training.schedule import StepHyperparameters
from dsv3.training.step import TrainStep

PACKAGE = str(Path(__file__).resolve().parents[1] / "dsv3") + "/"
ROOM = 0.92
"""Share of the device's memory that a planned slice may take; longer slices lose layers."""

WARMUP = 2
"""Steps that are not timed: kernels are loaded and chosen, optimizer state is made, code is compiled."""

Step = Callable[[], Tensor]
"""Takes a step, and returns its loss on the device."""


def slice_job(options: argparse.Namespace, compiled: bool) -> Job:
    """Return the job of the slice, of as many of the layers asked for as the device has room for."""
    register()
    overrides = [
        f"model={options.model}", f"precision={options.precision}", f"recompute={options.recompute}",
        f"train.sequence_length={options.length}", f"train.microbatch_size={options.microbatch}",
        f"train.global_batch_size={options.microbatch}", "launch.nproc=1", "logger=none", "data=stdlib",
        f"compile={'on' if compiled else 'off'}", *options.override,
    ]  # fmt: skip
    if options.experts:
        overrides.append(f"model.moe.num_experts={options.experts}")
    with initialize_config_dir(str(CONF), version_base=None):
        config: Config = strict(compose("config", overrides))
    whole = config.model
    for layers in range(min(options.layers, whole.num_layers), 1, -1):
        dense = min(whole.num_dense_layers, 1)
        model = replace(whole, num_layers=layers, num_dense_layers=dense)
        job = plan_job(replace(config, model=model), [])
        room = job.hardware.memory_bytes
        if room is None or job.plan.memory.total <= ROOM * room:
            return job
    raise SystemExit(f"not even two layers of {options.model} fit this device")


def our_step(job: Job, device: torch.device, batch: Batch) -> tuple[Step, str | None]:
    """Return a training step of the job's model with random weights, and the FP8 engine if it has one."""
    config = job.config
    model = build_parallel_model(config, None, device, initial=False)
    with torch.no_grad():
        for part in model.model_parts:
            for buffer in part.buffers():
                buffer.zero_()
            for parameter in part.parameters():  # on the device: drawing on the CPU would take minutes
                vector = parameter.ndim == 1
                parameter.fill_(1.0) if vector else parameter.normal_(0.0, config.model.init_std)
    optimizer = build_optimizer(config.optimizer, model.model_parts, config.precision.moments)
    step = TrainStep(model.forward_backward, optimizer, RankContext(0, 0, 1, device), config.train.clip_norm)
    now = StepHyperparameters(lr=1e-4, mtp_weight=0.3, balance_weight=1e-4, bias_speed=1e-3)
    return lambda: step([batch], now).loss, fp8_engine_name(model.model_parts)


def peer_step(job: Job, device: torch.device, batch: Batch, experts: str, autocast: bool) -> Step:
    """Return the same step of HF transformers' model, with bf16 weights or fp32 ones under autocast."""
    from benchmarks.train_step import peer_model

    with torch.device(device):
        model = peer_model(job.config.model, experts, job.config.train.length)
    model = model.to(device) if autocast else model.to(device, torch.bfloat16)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True
    )
    tokens, targets = batch.tokens.to(device), batch.targets.to(device)

    def step() -> Tensor:
        with torch.autocast(device.type, torch.bfloat16) if autocast else nullcontext():
            logits = model(tokens).logits
        loss = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step


def random_batch(job: Job) -> Batch:
    """Return one microbatch of random tokens, each row one document."""
    train = job.config.train
    generator = torch.Generator().manual_seed(0)
    shape = (train.microbatch, train.length + 1)
    rows = torch.randint(0, job.config.model.vocab_size, shape, generator=generator)
    documents = torch.zeros(train.length + 1, dtype=torch.int32).numpy()
    return collate([PackedRow(row.numpy(), documents) for row in rows])


def timed(step: Step, steps: int) -> tuple[list[float], float, float]:
    """Return the seconds of `steps` steps after the warm-up, and the first and the last loss."""
    first = step().item()
    for _ in range(WARMUP - 1):
        step()
    seconds = []
    for _ in range(steps):
        torch.cuda.synchronize()
        started = time.perf_counter()
        last = step()
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return seconds, first, last.item()


def matmul_flops(device: torch.device, dtype: torch.dtype, size: int) -> float:
    """Return the FLOP/s of a square matmul, the best of 10."""
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    best = float("inf")
    for _ in range(10):
        torch.cuda.synchronize()
        started = time.perf_counter()
        a @ b
        torch.cuda.synchronize()
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best


def measure(job: Job, device: torch.device, steps: int, matmul_size: int) -> dict[str, Any]:
    """Return what a slice does on this device."""
    config, batch = job.config, random_batch(job)
    torch.cuda.reset_peak_memory_stats()
    step, engine = our_step(job, device, batch)
    seconds, first, last = timed(step, steps)
    rate = batch.tokens.numel() / median(seconds)
    kind = config.precision.matmul_type(engine)
    peak = getattr(job.hardware, f"peak_flops_{kind}")
    by_convention = {
        c.value: training_flops_per_token(config.model, config.train.length, c) for c in FlopsConvention
    }
    dtype = getattr(torch, config.precision.compute.value)
    matmul = matmul_flops(device, dtype, matmul_size)
    return {
        "layers": config.model.num_layers, "experts": config.model.moe.num_experts,
        "batch": list(batch.tokens.shape), "precision": config.precision.label, "fp8_engine": engine,
        "recompute": config.recompute.mode.value, "compile": config.compile.enabled,
        "tokens_per_second": rate, "step_ms": 1000 * median(seconds),
        "tflops": rate * by_convention["causal"] / 1e12,
        "mfu": {name: peak and rate * flops / peak for name, flops in by_convention.items()},
        "mfu_of": f"{kind} data-sheet peak of {job.hardware.name}",
        "matmul_tflops": matmul / 1e12,
        "share_of_matmul_rate": rate * by_convention["causal"] / matmul,
        "planned_gib": job.plan.memory.total / 2**30,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30,
        "first_loss": first, "last_loss": last,
    }  # fmt: skip


def compare_with_peer(job: Job, device: torch.device, steps: int) -> dict[str, Any]:
    """Return tokens/s of ours and of HF transformers' model in each way it has, one after the other."""
    batch = random_batch(job)
    found: dict[str, Any] = {"tokens_per_second": {}, "peak_gib": {}}
    makers: dict[str, Callable[[], Step]] = {"dsv3": lambda: our_step(job, device, batch)[0]}
    for experts in ("grouped_mm", "eager"):
        for autocast in (True, False):
            name = f"hf {experts}, {'autocast' if autocast else 'bf16 weights'}"
            makers[name] = lambda e=experts, a=autocast: peer_step(job, device, batch, e, a)  # type: ignore[misc]
    for name, make in makers.items():
        torch.cuda.reset_peak_memory_stats()
        try:
            seconds, *_ = timed(make(), steps)
            found["tokens_per_second"][name] = batch.tokens.numel() / median(seconds)
            found["peak_gib"][name] = torch.cuda.max_memory_allocated() / 2**30
        except Exception as error:  # one way of the peer's that cannot run leaves the others
            found.setdefault("failed", {})[name] = f"{type(error).__name__}: {error}"[:300]
        gc.collect()
        torch.cuda.empty_cache()
    rates = dict(found["tokens_per_second"])
    ours = rates.pop("dsv3", None)
    if ours and rates:
        found["best_peer"] = max(rates, key=lambda name: rates[name])
        found["ratio"] = ours / max(rates.values())
    return found


def host_waits(job: Job, device: torch.device) -> dict[str, Any]:
    """Return where the host waits in a step, by function of dsv3, as torch.cuda.set_sync_debug_mode tells."""
    step, _ = our_step(job, device, random_batch(job))
    for _ in range(WARMUP):
        step()
    counts: Counter[str] = Counter()

    def note(message: Any, *_: Any, **__: Any) -> None:
        if "synchronizing" in str(message):
            counts[_asker()] += 1

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = note
        torch.cuda.set_sync_debug_mode("warn")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return {
        "layers": job.config.model.num_layers,
        "waits": dict(counts),
        "waits_per_step": sum(counts.values()),
    }


def _asker() -> str:
    """Return the innermost function of dsv3 that runs, as tests/cuda names it; autograd's have none."""
    frame: Any = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_filename.startswith(PACKAGE):
            return f"{frame.f_code.co_filename.removeprefix(PACKAGE)} {frame.f_code.co_qualname}"
        frame = frame.f_back
    return "autograd"


def show(found: dict[str, Any]) -> str:
    """Return the figures as one line."""
    flat: dict[str, Any] = {}
    for key, value in found.items():
        flat |= {f"{key}.{k}": v for k, v in value.items()} if isinstance(value, dict) else {key: value}
    return ", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in flat.items())


def arguments() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--model", default="16b")
    parser.add_argument("--layers", type=int, default=8, help="at most; fewer where they do not fit")
    parser.add_argument("--experts", type=int, help="routed experts per layer; the model's own by default")
    parser.add_argument("--length", type=int, default=4096, help="tokens per sequence")
    parser.add_argument("--microbatch", type=int, default=2, help="sequences")
    parser.add_argument("--steps", type=int, default=6, help="timed steps")
    parser.add_argument("--precision", default="bf16")
    parser.add_argument("--recompute", default="none")
    parser.add_argument("--compile", choices=["off", "on", "both"], default="off")
    parser.add_argument("--matmul-size", type=int, default=8192)
    parser.add_argument(
        "--sync-debug", action="store_true", help="where the host waits, instead of the speed"
    )
    parser.add_argument("--peer", action="store_true", help="beside HF transformers, instead of alone")
    parser.add_argument("--json", type=Path)
    parser.add_argument("override", nargs="*", help="further overrides of train.py")
    return parser


def main() -> None:
    """Measure, print, write JSON."""
    options = arguments().parse_args()
    device = torch.device("cuda", 0)
    if not torch.cuda.is_available():
        raise SystemExit("there is no CUDA GPU here")
    found: dict[str, Any] = {"model": options.model}
    if options.sync_debug or options.peer:
        job = slice_job(options, options.compile == "on")
        found |= (
            host_waits(job, device) if options.sync_debug else compare_with_peer(job, device, options.steps)
        )
    else:
        for compiled in {"off": [False], "on": [True], "both": [False, True]}[options.compile]:
            measured = measure(slice_job(options, compiled), device, options.steps, options.matmul_size)
            found |= {"compiled": measured} if compiled and options.compile == "both" else measured
            gc.collect()
            torch.cuda.empty_cache()
        if "compiled" in found:
            found["compiled_speedup"] = found["compiled"]["tokens_per_second"] / found["tokens_per_second"]
    print(show(found), flush=True)
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
