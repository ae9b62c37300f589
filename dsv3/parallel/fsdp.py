"""Fully sharded data parallel (FSDP2): a layer's parameters are all-gathered only while the layer computes.

A parameter is sharded over all ranks that use it on different tokens. TP-sharded parameters are sharded
over data and context ranks, routed experts over the ranks that `ep` leaves, everything else over the tensor
ranks as well. So nothing is stored twice except under dp_replicate, and all gradient reduction is FSDP's:
TP needs no all-reduce of gradients.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import nn
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
    """Wrapper that shards every layer and then the root over the ranks that see different tokens."""

    prefetch: bool
    cpu_offload: bool
    reshard_after_forward: bool

    def __call__(self, root: nn.Module, mesh: ParallelMesh, dtype: torch.dtype) -> None:
        """Wrap `root` in place. Gradients are reduced in fp32 and summed, not averaged.

        Weights are all-gathered in `dtype`, the compute dtype, to which the layers would cast them in any
        case; modules that compute in fp32 form a group of their own in each layer. The loss is already
        divided by the global token count, so a mean over ranks would divide twice. On gloo a divide
        factor needs the forced sum as well.
        """
        blocks = [module for module in root.modules() if isinstance(module, Block)]
        for module in [*blocks, root]:
            self._shard_module(module, mesh, dtype, self.reshard_after_forward and module is not root)
        for module in root.modules():
            if isinstance(module, FSDPModule):
                module.set_gradient_divide_factor(1.0)
                module.set_force_sum_reduction_for_comms(True)
        if self.prefetch:
            _set_prefetch(blocks)

    def _shard_module(self, module: nn.Module, mesh: ParallelMesh, dtype: torch.dtype, reshard: bool) -> None:
        """Shard a layer, or the root with what no layer has: inner groups first, `module` takes the rest."""
        # Do not cast inputs: FSDP would round the rotary tables to the compute dtype.
        fp32 = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)
        policy = replace(fp32, param_dtype=dtype)
        # On a CPU the shards are in host memory already.
        offload = (
            CPUOffloadPolicy() if self.cpu_offload and mesh.dense.device_type != "cpu" else OffloadPolicy()
        )
        shard = partial(fully_shard, reshard_after_forward=reshard, offload_policy=offload)
        inner = list(_submodules(module))
        for experts in (m for m in inner if isinstance(m, Experts)):
            # Whole experts while there is one for every shard, else a slice of each expert.
            local_experts = experts.gate_up_proj.shape[0] // mesh.degrees.ep
            placement = Shard(0 if local_experts >= mesh.degrees.efsdp_size else 1)
            shard(
                experts,
                mesh=mesh.fsdp_axes(mesh.expert),
                mp_policy=policy,
                shard_placement_fn=lambda _, placement=placement: placement,
            )
        tp_sharded = [
            m for m in inner if mesh.degrees.tp > 1 and isinstance(getattr(m, "weight", None), DTensor)
        ]
        # The root's are used at both ends of the model and again by MTP: each is a group of its own.
        is_root = not isinstance(module, Block)
        for group in [[m] for m in tp_sharded] if is_root else [tp_sharded] * bool(tp_sharded):
            shard(group, mesh=mesh.fsdp_axes(mesh.dense), mp_policy=policy)
        in_fp32 = [m for m in inner if isinstance(m, RMSNorm | Router)]
        if dtype != torch.float32 and in_fp32:
            shard(in_fp32, mesh=mesh.fsdp_axes(mesh.replicated), mp_policy=fp32)
        shard(module, mesh=mesh.fsdp_axes(mesh.replicated), mp_policy=policy)


def _submodules(module: nn.Module) -> Iterator[nn.Module]:
    """Yield the modules below `module`, without layers and the modules below those."""
    for child in module.children():
        if not isinstance(child, Block):
            yield child
            yield from _submodules(child)


def _set_prefetch(blocks: list[Block]) -> None:
    """Prefetch the next layer's groups while a layer computes.

    FSDP's default prefetch would stall, because token dispatch makes the host wait for its row counts.
    """
    groups = [[m for m in block.modules() if isinstance(m, FSDPModule)] for block in blocks]
    for block, following in zip(blocks, groups[1:], strict=False):
        block.set_modules_to_forward_prefetch(following)  # type: ignore[operator]
    for block, before in zip(blocks[1:], groups, strict=False):
        block.set_modules_to_backward_prefetch(before)  # type: ignore[operator]
