"""FSDP's all-gather of weights in FP8: each rank quantizes its shard, and matmuls take the gathered codes.

Only for weights whose shards hold whole blocks of 128 x 128: the codes and scales are then those that the
matmul would have made of the whole weight. Other weights are gathered in the compute dtype.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from dsv3.distributed.torch_private import local_shard
from dsv3.fp8.operands import WEIGHT_BLOCK, QuantizedWeight
from dsv3.fp8.quantize import BLOCK, quantize


def all_gather_in_fp8(weight: nn.Parameter, power_of_two: bool) -> None:
    """Let FSDP all-gather `weight` in FP8 where its shards hold whole blocks; every rank decides alike.

    FSDP looks for the two functions on the local tensor before its first all-gather. Where a rank is alone
    in its group nothing is gathered, and FSDP would pass on only the first of the tensors it was given.
    """
    if not isinstance(weight, DTensor):
        return
    mesh = weight.device_mesh
    names = mesh.mesh_dim_names or ()  # parallel/mesh.py names FSDP's own dimension "fsdp"
    shards = mesh.size(names.index("fsdp")) if "fsdp" in names else 1
    if shards == 1 or not _has_whole_blocks(weight):
        return
    local = local_shard(weight)
    gather = FP8AllGather(local, power_of_two)
    local.fsdp_pre_all_gather = gather.pre_all_gather  # type: ignore[attr-defined]
    local.fsdp_post_all_gather = gather.post_all_gather  # type: ignore[attr-defined]


def _has_whole_blocks(weight: DTensor) -> bool:
    """Return whether FSDP shards dim 0 in equal parts of whole blocks: rows, or experts of whole blocks each.

    Where tensor or expert parallelism shards dim 0 too, FSDP's placement is a strided shard, which is not a
    Shard.
    """
    sharded_dims = [getattr(placement, "dim", None) for placement in weight.placements]
    parts = math.prod(weight.device_mesh.size(n) for n, dim in enumerate(sharded_dims) if dim == 0)
    rows, remainder = divmod(weight.shape[0], parts)
    if weight.ndim == 3:
        return not remainder and 1 not in sharded_dims and weight.shape[1] % BLOCK == 0
    return not remainder and rows % BLOCK == 0


class FP8AllGather:
    """The all-gather of one weight's shards [.., rows, columns] as codes and scales."""

    def __init__(self, shard: Tensor, power_of_two: bool) -> None:
        self.shard = shard
        self.power_of_two = power_of_two

    @torch.no_grad()
    def pre_all_gather(
        self, mesh: Any, outer_size: Any, outer_stride: Any, module: Any, mp_policy: Any
    ) -> tuple[tuple[Tensor, Tensor], None]:
        """Return the tensors to gather, uint8 codes [.., rows, columns] and fp32 scales, and no metadata."""
        rows = self.shard.to(mp_policy.param_dtype).flatten(0, -2)
        codes, scales = quantize(rows, WEIGHT_BLOCK, power_of_two=self.power_of_two)
        return (codes.view(torch.uint8).view_as(self.shard), scales), None

    @torch.no_grad()
    def post_all_gather(
        self, outputs: tuple[Tensor, ...], metadata: Any, dtype: torch.dtype, *, out: Tensor | None = None
    ) -> tuple[Tensor, tuple[Tensor, ...]] | None:
        """Return the whole weight in `dtype`, and the gathered tensors.

        With `out`, a weight of an earlier call, FSDP has refilled its tensors: return None.
        """
        codes, scales = outputs
        # A shard that ends within a block would bring one row of scales too many, and shift all after it.
        assert scales.shape[0] * BLOCK == codes.shape[:-1].numel(), (scales.shape, codes.shape)
        if out is None:
            return QuantizedWeight(codes.view(torch.float8_e4m3fn), scales, dtype), outputs
        weight = local_shard(out) if isinstance(out, DTensor) else out
        assert isinstance(weight, QuantizedWeight)
        assert weight.codes.data_ptr() == codes.data_ptr()
        return None
