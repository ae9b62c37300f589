"""A few optimizer steps of a tiny model, for comparing layouts; runs in the test process and in workers."""

import functools
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dsv3.checkpoint.directory import find_checkpoint
from dsv3.checkpoint.load import load_weights
from dsv3.config.root import Config
from dsv3.config.strict import strict
from dsv3.data.loader import Loader
from dsv3.data.packing import Row
from dsv3.distributed.process_group import RankContext
from dsv3.parallel.mesh import ParallelMesh, build_mesh, place
from dsv3.parallel.parallel_model import ParallelModel, build_parallel_model
from dsv3.planning.layout import ParallelDims
from dsv3.training.evaluation import evaluate
from dsv3.training.optimizer import BF16MomentAdamW
from dsv3.training.step import TrainStep, Weights
from tests.composing import compose

VOCAB, SEQUENCE, GLOBAL_BATCH = 96, 16, 8
TINY = [
    f"model.vocab_size={VOCAB}",
    "model.dim=32",
    "model.num_layers=4",
    "model.dense_hidden_dim=48",
    "model.attention.heads=4",
    "model.attention.q_lora_rank=16",
    "model.attention.kv_lora_rank=16",
    "model.attention.qk_nope_head_dim=8",
    "model.attention.qk_rope_head_dim=8",
    "model.attention.v_head_dim=8",
    "model.moe.num_experts=8",
    "model.moe.hidden_dim=16",
    "model.moe.top_k=2",
    "model.init_std=0.2",
    f"train.sequence_length={SEQUENCE}",
    f"train.global_batch_size={GLOBAL_BATCH}",
    "data.document_mask=true",
]
RATES = {"sgd": 0.35, "adamw": 1e-3, "bf16 moments": 1e-3}
WEIGHTS = Weights(lr=0.0, mtp=1.0, balance=0.01, bias_speed=0.01, z=1e-3)


@dataclass
class Trace:
    """What is compared: figures and full gradients of every step, parameters and buffers at the end."""

    figures: list[dict[str, float]]
    gradients: list[dict[str, Tensor]]
    state: dict[str, Tensor]
    evaluation: float = 0.0


class StepRows:
    """Rows for ever: those of step n are number n - 1 times GLOBAL_BATCH and on."""

    sequence_length = SEQUENCE

    def __len__(self) -> int:
        return GLOBAL_BATCH

    def row(self, index: int) -> Row:
        """Several documents of uneven lengths, so that valid targets differ between ranks."""
        generator = torch.Generator().manual_seed(index)
        tokens = torch.randint(0, VOCAB, (SEQUENCE + 1,), generator=generator)
        starts = torch.rand(SEQUENCE + 1, generator=generator) < 0.1
        return Row(tokens.numpy(), starts.cumsum(-1).to(torch.int32).numpy())


@functools.cache
def mesh_of(degrees: ParallelDims, ranks_per_node: int | None = None) -> ParallelMesh:
    """One mesh a layout for the life of the process: DTensor remembers meshes, and groups are costly."""
    return build_mesh(degrees, "cpu", ranks_per_node)


def train(
    overrides: list[str], degrees: ParallelDims | None, steps: int, microbatch: int, optimizer: str = "sgd"
) -> Trace | None:
    """Train `steps` on data that depends on the step alone; None on ranks that the layout leaves out."""
    return train_config(configured(overrides, microbatch), degrees, steps, microbatch, optimizer)


def configured(overrides: list[str], microbatch: int) -> Config:
    """The tiny model's config. Composing takes half a second: once for all ranks is enough."""
    config: Config = strict(compose([*TINY, f"train.microbatch_size={microbatch}", *overrides]))
    return config


def train_config(
    config: Config, degrees: ParallelDims | None, steps: int, microbatch: int, optimizer: str
) -> Trace | None:
    """What `train` does with a composed config."""
    setup = prepared(config, degrees, optimizer)
    if setup is None:
        return None
    model, chosen, ranks = setup
    trace = Trace([], [], {})
    keep = chosen.register_step_pre_hook(lambda *_: trace.gradients.append(_gradients(model)))
    step = TrainStep(model.forward_backward, chosen, ranks, clip_norm=1e9)
    for number in range(steps):
        figures = take_step(step, number, microbatch, optimizer)
        trace.figures.append({name: value.item() for name, value in figures.items()})
    keep.remove()
    trace.evaluation = evaluate(model.forward_backward, StepRows(), microbatch, ranks).loss
    trace.state = {name: full(value).clone() for name, value in model.named_tensors().items()}
    return trace


def prepared(
    config: Config, degrees: ParallelDims | None, optimizer: str
) -> tuple[ParallelModel, torch.optim.Optimizer, RankContext] | None:
    """The model on this rank with biases that are not zero, its optimizer and the rank; None if left out."""
    rank = torch.distributed.get_rank() if degrees else 0
    expert = config.parallel.expert
    mesh = mesh_of(degrees, expert and expert.ranks_per_node) if degrees else None
    if degrees and rank >= degrees.world_size:
        return None
    ranks = RankContext(rank, rank, degrees.world_size if degrees else 1, torch.device("cpu"))
    ranks = place(ranks, mesh)
    model = build_parallel_model(config, mesh, ranks.device)
    for place_, router in sorted(model.routers.items()):
        if router.selection_bias is not None:
            generator = torch.Generator().manual_seed(place_)
            router.selection_bias.copy_(0.05 * torch.randn(router.selection_bias.shape, generator=generator))
    if config.checkpoint.load:
        load_weights(model.parts, find_checkpoint(config.checkpoint.load))
    parameters = [p for part in model.parts for p in part.parameters()]
    return model, _optimizer(optimizer, parameters), ranks


def take_step(step: TrainStep, number: int, microbatch: int, optimizer: str) -> dict[str, Tensor]:
    """The optimizer step of this number, from 0; its figures."""
    loader = Loader(StepRows(), GLOBAL_BATCH, microbatch, step.ranks.data_rank, step.ranks.data_world)
    weights = replace(WEIGHTS, lr=RATES[optimizer])
    return step(loader.microbatches(number * GLOBAL_BATCH), weights)


def _optimizer(name: str, parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    if name == "sgd":
        return torch.optim.SGD(parameters, lr=1.0, foreach=False)
    # With a tiny eps AdamW turns rounding into steps of the size of lr.
    if name == "bf16 moments":
        return BF16MomentAdamW(parameters, eps=1e-4, fused=False)
    return torch.optim.AdamW(parameters, eps=1e-4, foreach=False)


def full(tensor: Tensor) -> Tensor:
    """The whole tensor of a shard; a collective."""
    whole = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    assert isinstance(whole, Tensor)
    return whole.detach()


def _gradients(model: ParallelModel) -> dict[str, Tensor]:
    found = {name: parameter.grad for name, parameter in model.named_parameters().items()}
    return {name: full(gradient).clone() for name, gradient in found.items() if gradient is not None}
