"""profile=on: a torch.profiler trace of some steps, and a memory snapshot on CUDA."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from dsv3.config.launch import ProfileConfig
from dsv3.distributed.process_group import RankContext


@contextmanager
def profiler(config: ProfileConfig, run_dir: Path, ranks: RankContext) -> Iterator[Callable[[], None]]:
    """Give the function to call after each step; traces go to RUN_DIR/profile/, one file a rank."""
    if not config.enabled:
        yield lambda: None
        return
    folder = run_dir / "profile"
    folder.mkdir(exist_ok=True)
    cuda = ranks.device.type == "cuda"
    if cuda:
        torch.cuda.memory._record_memory_history()

    def export(finished: profile) -> None:
        finished.export_chrome_trace(str(folder / f"trace-rank{ranks.rank}.json"))
        if cuda:
            torch.cuda.memory._dump_snapshot(str(folder / f"memory-rank{ranks.rank}.pickle"))

    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    plan = schedule(wait=config.wait, warmup=1, active=config.steps, repeat=1)
    with profile(activities=activities, schedule=plan, on_trace_ready=export) as running:
        yield running.step
