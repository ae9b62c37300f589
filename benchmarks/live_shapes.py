"""Bytes of one rank at the fullest moment of a step with layers of the real sizes, in large worlds.

A case is what benchmarks/live_ranks.py has, with fake tensors instead of real ones: they have sizes and
storages, FSDP frees and fills them, and no operator computes. The world is PyTorch's fake process group.
Every expert gets as many rows as an even load gives, as the plan assumes. Counted is what a step adds to
parameters and optimizer state, as benchmarks/live_memory.py counts it.
"""

import weakref
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor, distributed
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.tensor import DTensor

from benchmarks import live_memory
from benchmarks.live_memory import Block, LiveBytes
from dsv3.config.root import Config
from dsv3.launch.job import Job, plan_job
from dsv3.model.moe import RowCounts
from dsv3.parallel import token_dispatch
from dsv3.parallel.parallel_model import ParallelModel, build_parallel_model
from dsv3.parallel.token_dispatch import AllToAllSplits, DispatchPlan
from dsv3.planning.memory import MemoryBytes
from dsv3.planning.plan import Plan
from dsv3.tasks.setup import build_mesh
from dsv3.training.loss import LossDenominators
from dsv3.training.schedule import StepHyperparameters
from tests.harness.composing import strict_config
from tests.parallel.fake_world import fake_rank, local_shards

CPU = torch.device("cpu")
WEIGHTS = StepHyperparameters(1e-3, 0.3, 1e-4, 0.001, 0.0)


class ResizedBytes(LiveBytes):
    """Counts storages that FSDP frees and fills again, too."""

    def _add(self, func: Any, tensor: Tensor) -> None:
        if not isinstance(tensor, DTensor):  # its local tensor counts
            super()._add(func, tensor)

    @contextmanager
    def following(self) -> Iterator[None]:
        """Count, and see storages being resized."""
        resize = torch.UntypedStorage.resize_

        def counted(storage: torch.UntypedStorage, size: int) -> Any:
            key, before = storage._cdata, storage.nbytes()
            result = resize(storage, size)
            if key not in self.live and key not in self.known:
                self.live[key] = Block(before, "filled again")
                self.now += before
                weakref.finalize(storage, self._drop, key)
            if key in self.live:
                self.now += size - self.live[key].bytes
                self.live[key].bytes = size
                self.peak = max(self.peak, self.now)
            return result

        with mock.patch.object(torch.UntypedStorage, "resize_", counted), self:
            yield


def measure_shape(world: int, rank: int, overrides: list[str], batches_of: Any) -> tuple[int, Plan, Config]:
    """Return the bytes that a step adds, the plan and the config; `batches_of` makes microbatches."""
    job = plan_job(strict_config(overrides), overrides)
    with (
        fake_rank(rank, world) as ranks,
        mock.patch.object(live_memory, "META", CPU),
        mock.patch.object(token_dispatch, "exchange_counts", _even_counts(job)),
        live_memory._meta_operators(),
        ExitStack() as later,
    ):
        mesh = build_mesh(job, ranks)
        model = build_parallel_model(job.config, mesh, torch.device("meta"), initial=False)
        batches = batches_of(job.config, job.plan.shape.microbatches)
        assert all(batch.lengths is None or len(batch.lengths) for batch in batches)  # read by the host
        later.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        for part in model.model_parts:
            part.to_empty(device="cpu")
            part.train()
        _forward_backward(model, batches)  # FSDP prepares its groups
        mode = ResizedBytes({shard.untyped_storage()._cdata for shard in local_shards(model)})
        with mode.following():
            _forward_backward(model, batches)
    return mode.peak, job.plan, job.config


def _forward_backward(model: ParallelModel, batches: list[Any]) -> None:
    for part in model.model_parts:
        part.zero_grad()
    model.forward_backward.train(batches, LossDenominators(torch.ones(()), 1), WEIGHTS)


def _even_counts(job: Job) -> Any:
    """Return a stand-in for the exchange of row counts, whose numbers the host reads."""
    moe, shape, degrees = job.config.model.moe, job.plan.shape, job.plan.degrees

    def exchange(routing_map: Tensor, groups: list[distributed.ProcessGroup]) -> DispatchPlan:
        tokens, experts = len(routing_map), moe.num_experts // degrees.ep
        levels = []
        for level, group in zip(shape.dispatch_levels(moe, degrees), groups, strict=True):
            each = [round(tokens * level.rows / level.ranks)] * level.ranks
            levels.append(AllToAllSplits(each, each, group))
        per_expert = [tokens * moe.top_k // experts] * experts
        return DispatchPlan(levels, RowCounts(torch.zeros(experts, dtype=torch.int64), per_expert))

    return exchange


def added(memory: MemoryBytes) -> int:
    """Return what the plan says that a step adds to parameters and optimizer state."""
    return memory.total - memory.save_copies - memory.parameters - memory.optimizer
