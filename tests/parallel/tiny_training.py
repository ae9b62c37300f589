"""Worker side: a few optimizer steps of a tiny model on a layout, traced for comparison.

The functions run in the workers of the pool, and in the test's own process for the single-process reference.
"""

import functools
from dataclasses import dataclass, replace
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from dsv3.checkpoint.directory import find_checkpoint
from dsv3.checkpoint.load import load_weights
from dsv3.config.root import Config
from dsv3.config.strict import strict
from dsv3.data.loader import DataLoader
from dsv3.data.packing import PADDING, PackedRow
from dsv3.distributed.process_group import RankContext
from dsv3.distributed.torch_private import local_shape_and_offset
from dsv3.model import head
from dsv3.parallel.mesh import ParallelMesh, assign_data_shard
from dsv3.parallel.parallel_model import ParallelModel, build_parallel_model
from dsv3.planning.batch_schedule import BatchSchedule
from dsv3.planning.layout import ParallelDims
from dsv3.training.evaluation import evaluate
from dsv3.training.optimizer import BF16MomentAdamW, build_optimizer
from dsv3.training.schedule import StepHyperparameters
from dsv3.training.step import StepMetrics, TrainStep, routers_by_place
from tests.harness.composing import compose
from tests.harness.tiny import MODEL

VOCAB, SEQUENCE, GLOBAL_BATCH = 96, 16, 8
LENGTHS = (13, 16, 16, 16, 0, 3, 16, 16)
"""Tokens of the rows of the first step, and of the evaluation; the second step's rows have no padding."""
BATCH = BatchSchedule(GLOBAL_BATCH)
TINY = [
    *MODEL,
    f"model.vocab_size={VOCAB}",
    "model.num_layers=4",
    "model.init_std=0.2",
    f"train.sequence_length={SEQUENCE}",
    f"train.global_batch_size={GLOBAL_BATCH}",
    "data.document_mask=true",
]
RATES = {"sgd": 0.35, "adamw": 1e-3, "bf16 moments": 1e-3, "configured": 1e-2}
HYPERPARAMETERS = StepHyperparameters(
    lr=0.0, mtp_weight=1.0, balance_weight=0.01, bias_speed=0.01, z_loss_weight=1e-3
)


class Shard(NamedTuple):
    """A rank's part of a tensor; trace_comparison.py puts the parts together, without collectives."""

    shape: tuple[int, ...]
    """That of the whole tensor."""
    offset: tuple[int, ...]
    values: Tensor


Tensors = dict[str, Tensor]


@dataclass
class Trace:
    """What is compared: metrics and full gradients of every step, parameters and buffers at the end.

    On the way from a worker a sharded tensor is a Shard.
    """

    metrics: list[dict[str, float]]
    gradients: list[Tensors]
    state: Tensors
    evaluation: float = 0.0


class StepRows:
    """An endless source of rows: step n reads GLOBAL_BATCH rows from number (n - 1) x GLOBAL_BATCH on.

    The first step's rows have padding: some ranks have none, and others have nothing else.
    """

    sequence_length = SEQUENCE

    def __len__(self) -> int:
        return GLOBAL_BATCH

    def row(self, index: int) -> PackedRow:
        """Return a row of several documents of uneven lengths, so that valid targets differ between ranks."""
        generator = torch.Generator().manual_seed(index)
        tokens = torch.randint(0, VOCAB, (SEQUENCE + 1,), generator=generator)
        starts = torch.rand(SEQUENCE + 1, generator=generator) < 0.1
        documents = starts.cumsum(-1).to(torch.int32).numpy()
        if index < GLOBAL_BATCH and LENGTHS[index] < SEQUENCE:
            documents[LENGTHS[index] :] = PADDING
        return PackedRow(tokens.numpy(), documents)


@functools.cache
def mesh_of(degrees: ParallelDims, ranks_per_node: int | None = None) -> ParallelMesh:
    """Return the one mesh of a layout in this process: DTensor caches meshes, and groups are costly."""
    return ParallelMesh(degrees, "cpu", ranks_per_node)


def train(
    overrides: list[str], degrees: ParallelDims | None, steps: int, microbatch: int, optimizer: str = "sgd"
) -> Trace | None:
    """Train `steps` on data that depends only on the step; None on ranks that the layout leaves out."""
    return train_config(configured(overrides, microbatch), degrees, steps, microbatch, optimizer)


def configured(overrides: list[str], microbatch: int) -> Config:
    """Compose the tiny model's config. It takes half a second, so do it once for all ranks."""
    config: Config = strict(compose([*TINY, f"train.microbatch_size={microbatch}", *overrides]))
    return replace(config, precision=config.precision.on("cpu"))


def train_config(
    config: Config, degrees: ParallelDims | None, steps: int, microbatch: int, optimizer: str
) -> Trace | None:
    """Do what `train` does, with a composed config."""
    setup = prepared(config, degrees, optimizer)
    if setup is None:
        return None
    model, chosen, ranks = setup
    trace = Trace([], [], {})
    keep = chosen.register_step_pre_hook(lambda *_: trace.gradients.append(_gradients(model)))
    step = TrainStep(model.forward_backward, chosen, ranks, clip_norm=1e9)
    # Several chunks in every microbatch, the last one shorter.
    with mock.patch.object(head, "CHUNK_BYTES", 4 * VOCAB * 5):
        for number in range(steps):
            metrics = take_step(step, number, microbatch, optimizer, BatchSchedule.of(config.train))
            trace.metrics.append({name: value.item() for name, value in metrics.known().items()})
        keep.remove()
        # Five of the eight rows, which most layouts cannot split evenly.
    found = evaluate(model.forward_backward, StepRows(), microbatch, ranks, 5 * SEQUENCE)
    assert found.loss is not None
    trace.evaluation = found.loss
    trace.state = {name: _own_part(value) for name, value in model.state_dict().items()}
    return trace


def prepared(
    config: Config, degrees: ParallelDims | None, optimizer: str
) -> tuple[ParallelModel, torch.optim.Optimizer, RankContext] | None:
    """Build the model with non-zero expert biases, and its optimizer; None on ranks that are left out."""
    rank = torch.distributed.get_rank() if degrees else 0
    expert = config.parallel.expert
    mesh = mesh_of(degrees, expert and expert.ranks_per_node) if degrees else None
    if degrees and rank >= degrees.world_size:
        return None
    ranks = RankContext(rank, rank, degrees.world_size if degrees else 1, torch.device("cpu"))
    ranks = assign_data_shard(ranks, mesh)
    initial = config.checkpoint.load is None
    model = build_parallel_model(config, mesh, ranks.device, initial)
    for place, router in sorted(routers_by_place(model.model_parts).items()):
        if router.selection_bias is not None:
            generator = torch.Generator().manual_seed(place)
            router.selection_bias.copy_(0.05 * torch.randn(router.selection_bias.shape, generator=generator))
    if config.checkpoint.load:
        load_weights(model.model_parts, find_checkpoint(config.checkpoint.load), ranks)
    if optimizer == "configured":
        return model, build_optimizer(config.optimizer, model.model_parts), ranks
    parameters = [p for part in model.model_parts for p in part.parameters()]
    return model, _optimizer(optimizer, parameters), ranks


def take_step(
    step: TrainStep, number: int, microbatch: int, optimizer: str, batch: BatchSchedule = BATCH
) -> StepMetrics:
    """Take the optimizer step of this number, from 0."""
    loader = DataLoader(StepRows(), batch, microbatch, step.ranks.data_rank, step.ranks.data_world)
    hyperparameters = replace(HYPERPARAMETERS, lr=RATES[optimizer])
    return step(loader.microbatches(batch.samples_after(0, number)), hyperparameters)


def _optimizer(name: str, parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    if name == "sgd":
        return torch.optim.SGD(parameters, lr=1.0, foreach=False)
    # With a tiny eps AdamW turns rounding into steps of the size of lr.
    if name == "bf16 moments":
        return BF16MomentAdamW(parameters, eps=1e-4, fused=False)
    return torch.optim.AdamW(parameters, eps=1e-4, foreach=False)


def full(tensor: Tensor) -> Tensor:
    """Return the whole tensor of a shard; a collective."""
    whole = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    assert isinstance(whole, Tensor)
    return whole.detach()


def _gradients(model: ParallelModel) -> dict[str, Tensor]:
    named = [item for part in model.model_parts for item in part.named_parameters()]
    return {name: _own_part(p.grad) for name, p in named if p.grad is not None}


def _own_part(tensor: Tensor) -> Any:
    """Return a copy of a tensor, or of this rank's shard of it."""
    if not isinstance(tensor, DTensor):
        return tensor.detach().clone()
    assert not any(placement.is_partial() for placement in tensor.placements)
    _, offset = local_shape_and_offset(tensor)
    return Shard(tuple(tensor.shape), tuple(offset), tensor.to_local().detach().clone())
