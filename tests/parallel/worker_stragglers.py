"""Worker side: train with ranks that sleep, and find the slow one."""

import time

from dsv3.config.root import Config
from dsv3.distributed.step_waits import StepWaits
from dsv3.planning.layout import ParallelDims
from dsv3.training.step import TrainStep
from dsv3.training.stragglers import Straggler, StragglerWatch
from tests.parallel.tiny_training import prepared, take_step

SLEEP = 0.15
"""Seconds, more than a step of the tiny model takes."""

WINDOWS = 3


def find_slow_rank(
    config: Config, degrees: ParallelDims, microbatch: int, cases: list[dict[str, list[int]]]
) -> list[list[tuple[Straggler | None, str]]]:
    """Train three windows of a step per case, in which {"data" or "forward": ranks} sleep.

    Return what each window finds, and what the user is told.
    """
    setup = prepared(config, degrees, "sgd")
    if setup is None:
        return []
    model, optimizer, ranks = setup
    step, waits = TrainStep(model.forward_backward, optimizer, ranks, 1.0), StepWaits()
    layer = next(iter(model.model_parts[0].layers.values()))

    def observe(slow: dict[str, list[int]]) -> list[tuple[Straggler | None, str]]:
        watch, found = StragglerWatch(ranks, degrees.pp, waits), []
        sleeps = ranks.rank in slow.get("forward", [])
        hook = layer.register_forward_pre_hook(lambda *_: time.sleep(SLEEP) if sleeps else None)
        watch.start(compiled=False)
        for number in range(1 + WINDOWS):
            with waits.step():
                asked = time.perf_counter()
                if ranks.rank in slow.get("data", []):
                    time.sleep(SLEEP)
                waited = time.perf_counter() - asked
                take_step(step, number, microbatch, "sgd")
            watch.count(waited)
            if number:
                found.append(watch.compare())
        watch.stop()
        hook.remove()
        return found

    return [observe(slow) for slow in cases]
