"""Fully sharded data parallel (FSDP2): each layer's parameters are gathered only while it works.

A parameter is sharded over all ranks that use it on other tokens: what tensor parallelism splits over
data and context ranks, routed experts over the ranks that ep leaves, everything else over the tensor
ranks too. So nothing is stored twice but for dp_replicate, and the one sum of gradients is FSDP's.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from torch.distributed.tensor import DTensor, Shard

from dsv3.model.layers import RMSNorm
from dsv3.model.moe import Experts
from dsv3.model.router import Router
from dsv3.model.transformer import Block
from dsv3.parallel.mesh import ParallelMesh


@dataclass
class FullyShard:
    """Shards every layer and then the root over the ranks that see other tokens."""

    prefetch: bool
    cpu_offload: bool
    reshard_after_forward: bool

    def __call__(self, root: nn.Module, mesh: ParallelMesh, dtype: torch.dtype) -> None:
        """Wrap `root` in place; gradients are reduced in fp32 and summed, not averaged.

        Weights are gathered in `dtype`, the compute dtype, which the layers would cast them to in any
        case; those that compute in fp32 are a group of their own in each layer. The loss is already
        divided by the global count of tokens, so that a mean over ranks would divide twice. On gloo a
        divide factor needs the forced sum as well.
        """
        blocks = [module for module in root.modules() if isinstance(module, Block)]
        for module in [*blocks, root]:
            self._shard(module, mesh, dtype, self.reshard_after_forward and module is not root)
        for module in root.modules():
            if isinstance(module, FSDPModule):
                module.set_gradient_divide_factor(1.0)
                module.set_force_sum_reduction_for_comms(True)
        if self.prefetch:
            _prefetch(blocks)

    def _shard(self, module: nn.Module, mesh: ParallelMesh, dtype: torch.dtype, reshard: bool) -> None:
        """One layer (or the root with what no layer has): inner groups first, `module` takes the rest."""
        # Inputs stay as they are: FSDP would round the rotary tables to the compute dtype.
        fp32 = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)
        policy = replace(fp32, param_dtype=dtype)
        shard = partial(fully_shard, reshard_after_forward=reshard, offload_policy=self._offload(mesh.dense))
        inner = list(_inner(module))
        for experts in (m for m in inner if isinstance(m, Experts)):
            dim = _expert_dim(experts, mesh)
            shard(
                experts,
                mesh=mesh.shards(mesh.expert),
                mp_policy=policy,
                shard_placement_fn=partial(_along, dim),
            )
        split = [m for m in inner if mesh.degrees.tp > 1 and isinstance(getattr(m, "weight", None), DTensor)]
        # The root's are used at both ends of the model and again by MTP: each is a group of its own.
        for group in [[m] for m in split] if _is_root(module) else [split] * bool(split):
            shard(group, mesh=mesh.shards(mesh.dense), mp_policy=policy)
        in_fp32 = [m for m in inner if isinstance(m, RMSNorm | Router)]
        if dtype != torch.float32 and in_fp32:
            shard(in_fp32, mesh=mesh.shards(mesh.replicated), mp_policy=fp32)
        shard(module, mesh=mesh.shards(mesh.replicated), mp_policy=policy)

    def _offload(self, mesh: DeviceMesh) -> OffloadPolicy:
        """Shards in host memory, where that is not the device's own."""
        return CPUOffloadPolicy() if self.cpu_offload and mesh.device_type != "cpu" else OffloadPolicy()


def _inner(module: nn.Module) -> Iterator[nn.Module]:
    """What is below `module`, layers and what is below them left out."""
    for child in module.children():
        if not isinstance(child, Block):
            yield child
            yield from _inner(child)


def _is_root(module: nn.Module) -> bool:
    return not isinstance(module, Block)


def _along(dim: int, parameter: nn.Parameter) -> Shard:
    return Shard(dim)


def _expert_dim(experts: Experts, mesh: ParallelMesh) -> int:
    """Whole experts while there are enough of them, else a part of each."""
    own = experts.gate_up_proj.shape[0] // mesh.degrees.ep
    return 0 if own >= mesh.degrees.efsdp_size else 1


def _prefetch(blocks: list[Block]) -> None:
    """Gather the next layer's groups while one computes: waiting for row counts would stall the default."""
    groups = [[m for m in block.modules() if isinstance(m, FSDPModule)] for block in blocks]
    for block, following in zip(blocks, groups[1:], strict=False):
        block.set_modules_to_forward_prefetch(following)  # type: ignore[operator]
    for block, before in zip(blocks[1:], groups, strict=False):
        block.set_modules_to_backward_prefetch(before)  # type: ignore[operator]
