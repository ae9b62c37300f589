"""Fully sharded data parallel (FSDP2): each layer's parameters are gathered only while it works."""

from dataclasses import replace
from functools import partial

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from dsv3.model.block import Block
from dsv3.model.layers import RMSNorm
from dsv3.model.router import Router
from dsv3.model.transformer import Transformer


class FullyShard:
    """Shards every layer and then the root over `dp_shard` (and replicates over `dp_replicate`)."""

    def __init__(self, reshard_after_forward: bool) -> None:
        self.reshard_after_forward = reshard_after_forward

    def __call__(self, model: Transformer, mesh: DeviceMesh) -> None:
        """Wrap `model` in place; gradients are reduced in fp32 and summed, not averaged.

        Weights are gathered in the compute dtype, which the layers would cast them to in any case;
        those that compute in fp32 are a group of their own in each layer. The loss is already divided
        by the global count of tokens, so that a mean over ranks would divide twice. On gloo a divide
        factor needs the forced sum as well.
        """
        data = mesh["dp_shard"] if mesh["dp_replicate"].size() == 1 else mesh["dp_replicate", "dp_shard"]
        # Inputs stay as they are: FSDP would round the rotary tables to the compute dtype.
        fp32 = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)
        policy = replace(fp32, param_dtype=model.compute_dtype)
        blocks = [module for module in model.modules() if isinstance(module, Block)]
        for module in [*blocks, model]:
            reshard = self.reshard_after_forward and module is not model
            shard = partial(fully_shard, mesh=data, reshard_after_forward=reshard)
            if model.compute_dtype != torch.float32:
                shard(_fp32_modules(module), mp_policy=fp32)
            shard(module, mp_policy=policy)
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.set_gradient_divide_factor(1.0)
                module.set_force_sum_reduction_for_comms(True)


def _fp32_modules(module: nn.Module) -> list[nn.Module]:
    """The norms and routers below `module` that no inner group has taken, in the order of their use."""
    return [m for m in module.modules() if isinstance(m, RMSNorm | Router) and not isinstance(m, FSDPModule)]
