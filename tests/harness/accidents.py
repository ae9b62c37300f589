"""Put bad numbers into chosen steps of a run: a callback for train.callbacks, and the faults that it makes.

Steps are known by the first sequence of their batch, so that a step which is taken again, by a resume or a
replay, meets the same fault.
"""

import math
import os
import signal
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dsv3.checkpoint.state import local_tensor
from dsv3.distributed.torch_private import local_shape_and_offset
from dsv3.training.callbacks import Callback, TrainingRun
from dsv3.training.loss import LossSums


def spoil(parts: Any, sums: LossSums, fault: dict[str, Any], rank: int = 0) -> LossSums:
    """Do to the gradients and losses of a rank what `fault` says, and return the losses.

    kind: nan (the gradient of a parameter, or everything), loss, mtp (that loss alone), spike (all gradients
    times `factor`), break (the weights become infinite, the step's numbers do not). parameter, expert: where,
    of the whole model. rank: the only rank that it happens on, None for all.
    """
    if fault.get("rank") not in (None, rank):
        return sums
    kind, name, expert = fault["kind"], fault.get("parameter"), fault.get("expert")
    if kind in ("loss", "mtp"):
        field = "main" if kind == "loss" else "mtp"
        return sums._replace(**{field: getattr(sums, field) * math.nan})
    if kind == "break":
        for parameter in (each for part in parts for each in part.parameters()):
            local_tensor(parameter.detach()).mul_(math.inf)
        return sums
    factor = math.nan if kind == "nan" else float(fault.get("factor", 1000.0))
    for found, parameter in (item for part in parts for item in part.named_parameters()):
        if parameter.grad is None or (name is not None and found != name):
            continue
        gradient = local_tensor(parameter.grad)
        if expert is None:
            gradient.mul_(factor)
        elif 0 <= (here := expert - _first(parameter)) < len(gradient):
            gradient[here].mul_(factor)
    if kind == "nan" and name is None:
        return sums._replace(main=sums.main * math.nan)
    return sums


class Inject(Callback):
    """Spoils the steps that begin at given sequences, `first` of each of the `faults`.

    A fault is text: `first:12 kind:nan parameter:head.weight`. Of kind `kill` it kills its `rank`, once, when
    there is a file `may-die` beside the run.
    """

    def __init__(self, faults: list[str]) -> None:
        # A node of a callback takes values and lists of values alone.
        found = [dict(pair.split(":") for pair in fault.split()) for fault in faults]
        self.faults = {int(fault.pop("first")): _typed(fault) for fault in found}
        self.kick: float | None = None

    def on_train_start(self, run: TrainingRun) -> None:
        """Wrap the forward and backward pass of the run."""
        inner, parts = run.forward_backward.train, run.forward_backward.model_parts

        def train(*arguments: Any) -> LossSums:
            sums = inner(*arguments)
            fault = self.faults.get(run.progress.samples)
            if fault is not None and fault["kind"] == "kill":
                _kill_once(run.directory.parent, run.ranks.rank == fault["rank"])
                return sums
            if fault is not None and fault["kind"] == "weights":
                self.kick = float(fault["factor"])
                return sums
            return sums if fault is None else spoil(parts, sums, fault, run.ranks.rank)

        run.forward_backward.train = train  # type: ignore[assignment,method-assign]

    @torch.no_grad()
    def on_step_end(self, run: TrainingRun) -> None:
        """Multiply all weights after a step with a fault of kind `weights`, from which the loss goes up."""
        if self.kick is not None:
            for part in run.forward_backward.model_parts:
                for parameter in part.parameters():
                    local_tensor(parameter).mul_(self.kick)
            self.kick = None


class PassOver(Callback):
    """Takes no update at the steps that begin at given sequences, by means of its own."""

    def __init__(self, first: list[int]) -> None:
        self.first = [int(each) for each in first]

    def on_train_start(self, run: TrainingRun) -> None:
        """Let the optimizer and the biases stand still at these steps."""
        update = run.optimizer.step
        routers = [router for part in run.forward_backward.model_parts for router in part.routers()]

        def step(*arguments: Any) -> Any:
            takes = run.progress.samples not in self.first
            for router in routers:
                router.bias_moves = takes
            return update(*arguments) if takes else None

        run.optimizer.step = step  # type: ignore[assignment,method-assign]


class Rest(Callback):
    """Sleeps after each step, so that a run of hours leaves the machine to others."""

    def __init__(self, seconds: float) -> None:
        self.seconds = float(seconds)

    def on_step_end(self, run: TrainingRun) -> None:
        """Sleep."""
        time.sleep(self.seconds)


def injected(faults: dict[int, dict[str, Any]], passed: list[int] | None = None) -> list[str]:
    """Return the overrides that let a run meet `faults`, or pass over the steps `passed`."""
    texts = [" ".join(f"{key}:{value}" for key, value in fault.items()) for fault in faults.values()]
    told = ", ".join(f"'first:{first} {text}'" for first, text in zip(faults, texts, strict=True))
    node = f"{{_target_: tests.harness.accidents.Inject, faults: [{told}]}}"
    if passed is not None:
        node = f"{{_target_: tests.harness.accidents.PassOver, first: {passed}}}"
    return [f"+train.callbacks.inject={node}", "run.allow_targets=[tests.harness.accidents]"]


def _kill_once(folder: Path, is_victim: bool) -> None:
    """Kill this process where it is the victim, unless a file `died` says that this has been done."""
    if not is_victim or (folder / "died").exists():
        return
    while not (folder / "may-die").exists():
        time.sleep(0.05)
    (folder / "died").touch()
    os.kill(os.getpid(), signal.SIGKILL)


def _first(parameter: Tensor) -> int:
    """Return the number of the first expert of a stack that is on this rank."""
    return local_shape_and_offset(parameter)[1][0] if hasattr(parameter, "placements") else 0  # type: ignore[arg-type]


def _typed(fault: dict[str, str]) -> dict[str, Any]:
    """Return a fault with its numbers as numbers."""
    numbers: dict[str, Any] = {key: int(fault[key]) for key in ("expert", "rank") if key in fault}
    return {**fault, **numbers}
