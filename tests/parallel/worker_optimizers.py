"""Worker side: steps of many optimizers on any layout, with gradients that depend on names alone."""

import hashlib
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dsv3.checkpoint.directory import Progress
from dsv3.checkpoint.manager import CheckpointManager
from dsv3.checkpoint.state import local_tensor
from dsv3.config.checkpoint import CheckpointConfig
from dsv3.config.optimizer import OptimizerConfig
from dsv3.config.root import Config
from dsv3.model.initialization import initialize
from dsv3.model.transformer import Transformer
from dsv3.parallel.parallelize import shard_of, write_shard
from dsv3.planning.layout import ParallelDims
from dsv3.training.optimizer import build_optimizer, set_learning_rate
from tests.parallel.tiny_training import prepared

State = dict[str, Tensor]
SAVED_AT = 2
"""Steps before the checkpoint; one more is taken after it."""


class Several:
    """Optimizers of the same parameters, each with weights of its own, that are saved as if they were one."""

    def __init__(self, model_parts: list[Transformer], chosen: dict[str, OptimizerConfig]) -> None:
        self.model_parts = model_parts
        self.chosen = chosen
        self.members = {name: build_optimizer(node, model_parts) for name, node in chosen.items()}
        self.weights: dict[str, list[Tensor]] = {}
        self.param_groups = [group for member in self.members.values() for group in member.param_groups]

    @property
    def parameters(self) -> list[tuple[str, nn.Parameter]]:
        """Return the parameters of this rank by name."""
        return [item for part in self.model_parts for item in part.named_parameters()]

    @property
    def state(self) -> dict[nn.Parameter, dict[str, Tensor]]:
        """Return the tensors of all members by parameter, with their weights."""
        merged: dict[nn.Parameter, dict[str, Tensor]] = {}
        for place, (_, parameter) in enumerate(self.parameters):
            kept: dict[str, Tensor] = {}
            for name, member in self.members.items():
                state = member.state.get(parameter, {})
                kept |= {f"{name} {key}": value for key, value in state.items() if value is not None}
                if name in self.weights:
                    kept[f"{name} weight"] = self.weights[name][place]
            merged[parameter] = kept
        return merged

    def zero_grad(self, set_to_none: bool) -> None:
        """Take all gradients away."""
        for _, parameter in self.parameters:
            parameter.grad = None

    def step(self) -> None:
        """Let all members make their state; the weights are loaded afterwards."""
        for name, member in self.members.items():
            member.step()
            self.weights[name] = [parameter.detach().clone() for _, parameter in self.parameters]

    @torch.no_grad()
    def take(self, steps: range) -> None:
        """Take steps with each member, from its own weights or from the first ones."""
        for name, member in self.members.items():
            if name in self.weights:
                for (_, parameter), weight in zip(self.parameters, self.weights[name], strict=True):
                    local_tensor(parameter).copy_(local_tensor(weight))
            else:
                for part in self.model_parts:
                    initialize(part, seed=0, shard_of=shard_of)
            for step in steps:
                self.set_gradients(step)
                set_learning_rate(member, self.chosen[name].lr)
                member.step()
            self.weights[name] = [parameter.detach().clone() for _, parameter in self.parameters]

    def set_gradients(self, step: int) -> None:
        """Give every parameter a gradient that no layout changes."""
        for name, parameter in self.parameters:
            seed = int.from_bytes(hashlib.sha256(f"{step}/{name}".encode()).digest()[:6], "big")
            value = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed))
            parameter.grad = torch.zeros_like(parameter)
            write_shard(parameter.grad, value)

    def tensors(self) -> State:
        """Return the tensors of this rank by `PARAMETER OPTIMIZER KEY`."""
        state = self.state
        return {
            f"{name} {key}": value
            for name, parameter in self.parameters
            for key, value in state[parameter].items()
        }


class Compared(NamedTuple):
    """This rank's shards against one process's."""

    errors: dict[str, float]
    """Relative error of each tensor."""
    sizes: dict[str, int]
    """Bytes of state per optimizer, without its counters of steps."""


def state_sizes(tensors: State) -> dict[str, int]:
    """Return the bytes of state per optimizer among `tensors`, this rank's shards."""
    sizes: dict[str, int] = {}
    for name, tensor in tensors.items():
        optimizer, _, key = name.split(" ", 1)[1].rpartition(" ")
        if key != "weight" and tensor.ndim:
            sizes[optimizer] = sizes.get(optimizer, 0) + local_tensor(tensor).nbytes
    return sizes


def take_steps(
    config: Config,
    degrees: ParallelDims | None,
    chosen: dict[str, OptimizerConfig],
    run_dir: Path | None,
    resumes: bool = False,
) -> State:
    """Take two steps with each optimizer and save, or restore those and take a third; return all tensors."""
    setup = prepared(config, degrees, "sgd")
    assert setup is not None
    model, _, ranks = setup
    several = Several(model.model_parts, chosen)
    saved: Any = several  # the manager takes it for an optimizer
    if run_dir is None:
        several.take(range(SAVED_AT))
        return several.tensors()
    manager = CheckpointManager(run_dir, CheckpointConfig(async_save=False), ranks)
    if resumes:
        progress = manager.restore(model.model_parts, saved)
        assert progress is not None
        several.take(range(progress.step, progress.step + 1))
    else:
        several.take(range(SAVED_AT))
        manager.save(model.model_parts, saved, Progress(SAVED_AT))
    return several.tensors()


def compare_steps(
    config: Config,
    degrees: ParallelDims,
    chosen: dict[str, OptimizerConfig],
    run_dir: Path | None,
    expected: Path,
    resumes: bool = False,
) -> Compared:
    """Compare this rank's shards with a file of one process's tensors."""
    single: State = torch.load(expected)
    found = take_steps(config, degrees, chosen, run_dir, resumes)
    return Compared(
        {name: _error(tensor, single[name]) for name, tensor in found.items()}, state_sizes(found)
    )


def _error(tensor: Tensor, whole: Tensor) -> float:
    assert tensor.shape == whole.shape
    right = torch.zeros_like(tensor)
    write_shard(right, whole)
    return float((local_tensor(tensor) - local_tensor(right)).norm() / whole.norm().clamp(min=1e-12))
