"""A few optimizer steps of a tiny model, for comparing layouts; runs in the test process and in workers."""

from dataclasses import dataclass

import torch
from torch import Tensor

from dsv3.config import Config, strict
from dsv3.data.batch import collate
from dsv3.data.packing import Row
from dsv3.parallel.degrees import Degrees
from dsv3.parallel.mesh import build_mesh
from dsv3.parallel.parallelizer import build_model
from dsv3.runtime.distributed import Worker
from dsv3.training.step import TrainStep, Weights
from tests.composing import compose

VOCAB, SEQUENCE, GLOBAL_BATCH = 96, 12, 4
TINY = [
    f"model.vocab_size={VOCAB}",
    "model.dim=32",
    "model.num_layers=3",
    "model.dense_hidden_dim=48",
    "model.attention.heads=2",
    "model.attention.q_lora_rank=16",
    "model.attention.kv_lora_rank=16",
    "model.attention.qk_nope_head_dim=8",
    "model.attention.qk_rope_head_dim=8",
    "model.attention.v_head_dim=8",
    "model.moe.num_experts=8",
    "model.moe.hidden_dim=16",
    "model.moe.top_k=2",
    "model.init_std=0.2",
]


@dataclass
class Trace:
    """What is compared: figures and full gradients of every step, parameters and buffers at the end."""

    figures: list[dict[str, float]]
    gradients: list[dict[str, Tensor]]
    state: dict[str, Tensor]


def train(overrides: list[str], degrees: Degrees | None, rank: int, steps: int, microbatch: int) -> Trace:
    """Train `steps` of plain SGD on data that depends on the step alone, on this rank's share."""
    config: Config = strict(compose([*TINY, *overrides]))
    world = degrees.data_parallel if degrees else 1
    me = Worker(rank, rank, world, torch.device("cpu"))
    mesh = build_mesh(degrees, "cpu") if degrees else None
    model = build_model(config, mesh, me.device)
    biases = [router.selection_bias for router in model.routers() if router.selection_bias is not None]
    for number, bias in enumerate(biases):
        generator = torch.Generator().manual_seed(number)
        bias.copy_(0.05 * torch.randn(bias.shape, generator=generator))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    step = TrainStep(model, optimizer, me, clip_norm=1e9, document_mask=True)
    trace = Trace([], [], {})
    keep = optimizer.register_step_pre_hook(lambda *_: trace.gradients.append(_gradients(model)))
    for number in range(1, steps + 1):
        share = GLOBAL_BATCH // world
        rows = global_batch(number)[rank * share : (rank + 1) * share]
        batches = [collate(rows[first : first + microbatch]) for first in range(0, share, microbatch)]
        figures = step(batches, Weights(lr=1e-3, mtp=0.3, balance=0.01, bias_speed=0.01))
        trace.figures.append({name: value.item() for name, value in figures.items()})
    keep.remove()
    trace.state = {name: full(value).clone() for name, value in model.state_dict().items()}
    return trace


def global_batch(step: int) -> list[Row]:
    """Rows of several documents of uneven lengths, so that valid targets differ between ranks."""
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(0, VOCAB, (GLOBAL_BATCH, SEQUENCE + 1), generator=generator)
    starts = torch.rand((GLOBAL_BATCH, SEQUENCE + 1), generator=generator) < 0.3
    documents = starts.cumsum(-1).to(torch.int32)
    return [Row(t.numpy(), d.numpy()) for t, d in zip(tokens, documents, strict=True)]


def full(tensor: Tensor) -> Tensor:
    """The whole tensor of a shard; a collective."""
    whole = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    assert isinstance(whole, Tensor)
    return whole.detach()


def _gradients(model: torch.nn.Module) -> dict[str, Tensor]:
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    return {name: full(gradient).clone() for name, gradient in found.items() if gradient is not None}
