"""Fully sharded data parallel (FSDP2): each layer's parameters are gathered only while it works."""

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from dsv3.model.block import Block
from dsv3.model.transformer import Transformer


class FullyShard:
    """Shards every layer and then the root over `dp_shard` (and replicates over `dp_replicate`)."""

    def __init__(self, reshard_after_forward: bool) -> None:
        self.reshard_after_forward = reshard_after_forward

    def __call__(self, model: Transformer, mesh: DeviceMesh) -> None:
        """Wrap `model` in place; gradients are reduced in fp32 and summed, not averaged.

        The loss is already divided by the global count of tokens, so that a mean over ranks would
        divide twice. On gloo a divide factor needs the forced sum as well.
        """
        policy = MixedPrecisionPolicy(param_dtype=model.compute_dtype, reduce_dtype=torch.float32)
        data = mesh["dp_shard"] if mesh["dp_replicate"].size() == 1 else mesh["dp_replicate", "dp_shard"]
        blocks = [module for module in model.modules() if isinstance(module, Block)]
        for module in [*blocks, model]:
            reshard = self.reshard_after_forward and module is not model
            fully_shard(module, mesh=data, reshard_after_forward=reshard, mp_policy=policy)
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.set_gradient_divide_factor(1.0)
                module.set_force_sum_reduction_for_comms(True)
