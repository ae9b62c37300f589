"""State of every optimizer on every layout: the plan's bytes are those of the wrapped 671b on 2,048 ranks.

The world is PyTorch's fake process group, the shards are on the meta device: an optimizer takes its first
step there and makes its state, without arithmetic. Scalars, such as counters of steps, are left out.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from dsv3.checkpoint.state import local_tensor
from dsv3.config.optimizer import OptimizerConfig
from dsv3.config.precision import MomentType
from dsv3.config.registry import SCHEMAS
from dsv3.parallel.mesh import ParallelMesh
from dsv3.parallel.parallel_model import build_parallel_model
from dsv3.planning.memory import pipeline_memory
from dsv3.planning.plan import state_bytes
from dsv3.training import sharded_optimizers
from dsv3.training.optimizer import CHUNK_ELEMENTS, build_optimizer, freeze
from tests.parallel.fake_world import fake_rank, plan_world

WORLD = 2048
ONE_OF_EACH = ["model.num_layers=2", "model.num_dense_layers=1"]
"""A dense layer, an MoE layer and MTP's: every kind of weight. Of a pipeline the last stage is built."""
LAYOUTS = {
    "fsdp": ONE_OF_EACH,
    "hsdp": ONE_OF_EACH,
    "tp_ep": ONE_OF_EACH,
    "cp": ONE_OF_EACH,
    "pp": [],
    "full": [],
}
FROZEN = ["layers.*.attention.*", "embedding.weight"]


def optimizers() -> dict[str, OptimizerConfig]:
    """Return every choice of the group, and those of its keys that change the state."""
    nodes = {name.partition("/")[2]: node for name, node in SCHEMAS.items() if name.startswith("optimizer/")}
    found: dict[str, OptimizerConfig] = {name: node() for name, node in nodes.items()}
    # The fused kernel refuses the meta device; its state is the same.
    adamw = found["adamw"] = replace(found["adamw"], fused=False)  # type: ignore[call-arg]
    return found | {
        "adamw in bf16": adamw,
        "adamw frozen": replace(adamw, frozen=FROZEN),
        "adam amsgrad": SCHEMAS["optimizer/adam"](amsgrad=True),
        "sgd momentum": SCHEMAS["optimizer/sgd"](momentum=0.9),
        "rmsprop centered momentum": SCHEMAS["optimizer/rmsprop"](momentum=0.9, centered=True),
    }


@contextmanager
def _steps_on_meta() -> Iterator[None]:
    """Let optimizers read a scalar of the meta device, and add up no parts of one."""

    on_host = Tensor.item

    def item(tensor: Tensor) -> float:
        return 0.5 if tensor.is_meta else on_host(tensor)

    def of_all_parts(partial: Tensor, parameter: Tensor, dims: object) -> Tensor:
        return partial

    with (
        patch.object(Tensor, "item", item),
        patch.object(sharded_optimizers, "_sum", of_all_parts),
        patch.dict(CHUNK_ELEMENTS, meta=CHUNK_ELEMENTS["cuda"]),
    ):
        yield


def _bytes(tensors: list[Tensor]) -> int:
    return sum(local_tensor(tensor).nbytes for tensor in tensors if tensor.dim())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_parameters_gradients_and_the_state_of_every_optimizer_are_planned_to_the_byte(layout: str) -> None:
    job = plan_world("671b", layout, WORLD, *LAYOUTS[layout])
    config, degrees = job.config, job.plan.degrees
    with fake_rank(WORLD - WORLD // degrees.pp, WORLD), _steps_on_meta():
        mesh = ParallelMesh(degrees, "cpu")
        model = build_parallel_model(config, mesh, torch.device("meta"), initial=False)
        parameters = [p for part in model.model_parts for p in part.parameters()]
        for name, optimizer in optimizers().items():
            moments = MomentType.bf16 if "bf16" in name else MomentType.fp32
            shape = replace(job.plan.shape, state=state_bytes(optimizer, moments, compute=2))
            planned = pipeline_memory(config.model, degrees, shape)[-1]
            for parameter in parameters:
                parameter.requires_grad_(True)
            for part in model.model_parts:
                freeze(part, optimizer.frozen)
            built = build_optimizer(optimizer, model.model_parts, moments)
            for parameter in parameters:
                parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
            built.step()
            gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
            state = [value for held in built.state.values() for value in held.values()]
            found = (_bytes(list(parameters)), _bytes(gradients), _bytes(state))
            assert found == (planned.parameters, planned.gradients, planned.optimizer), name
