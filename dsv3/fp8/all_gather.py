"""FSDP's gathering of weights in FP8: a rank quantises its shard, and products take what has travelled.

Only where every shard holds whole blocks of 128 x 128: they are then the codes and scales that the product
would have made of the whole weight. Other weights are gathered in the compute dtype.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from dsv3.fp8.operands import SQUARE, BlockWeight
from dsv3.fp8.quantize import BLOCK, quantize


def gather_in_fp8(weight: nn.Parameter, power_of_two: bool) -> None:
    """Let FSDP gather `weight` in FP8 where it is sharded in whole blocks; the same answer on every rank.

    A rank alone in its group gathers nothing, and FSDP hands on the first tensor alone that it was given.
    FSDP looks for these two functions on the local tensor before its first gathering.
    """
    if not isinstance(weight, DTensor) or _shards(weight) == 1 or not _has_whole_blocks(weight):
        return
    local = weight._local_tensor
    gathering = Gathering(local, power_of_two)
    local.fsdp_pre_all_gather = gathering.send  # type: ignore[attr-defined]
    local.fsdp_post_all_gather = gathering.receive  # type: ignore[attr-defined]


def _shards(weight: DTensor) -> int:
    """Ranks on FSDP's own axis (parallel/mesh.py names it)."""
    mesh = weight.device_mesh
    names = mesh.mesh_dim_names or ()
    return mesh.size(names.index("fsdp")) if "fsdp" in names else 1


def _has_whole_blocks(weight: DTensor) -> bool:
    """Whether FSDP shards dim 0 in equal parts of whole blocks: rows, or experts with whole blocks each.

    Where tensor or expert parallelism cuts dim 0 too, FSDP's part is a strided shard, which is no Shard.
    """
    cut = [getattr(placement, "dim", None) for placement in weight.placements]
    parts = math.prod(weight.device_mesh.size(n) for n, dim in enumerate(cut) if dim == 0)
    rows, odd = divmod(weight.shape[0], parts)
    if weight.ndim == 3:
        return not odd and 1 not in cut and weight.shape[1] % BLOCK == 0
    return not odd and rows % BLOCK == 0


class Gathering:
    """One weight's shard [.., rows, columns] on the way to its whole."""

    def __init__(self, shard: Tensor, power_of_two: bool) -> None:
        self.shard = shard
        self.power_of_two = power_of_two

    @torch.no_grad()
    def send(
        self, mesh: Any, outer_size: Any, outer_stride: Any, module: Any, mp_policy: Any
    ) -> tuple[tuple[Tensor, Tensor], None]:
        """What travels, codes as bytes [.., rows, columns] and their scales; as FSDP wants it."""
        rows = self.shard.to(mp_policy.param_dtype).flatten(0, -2)
        codes, scales = quantize(rows, SQUARE, power_of_two=self.power_of_two)
        return (codes.view(torch.uint8).view_as(self.shard), scales), None

    @torch.no_grad()
    def receive(
        self, outputs: tuple[Tensor, ...], metadata: Any, dtype: torch.dtype, *, out: Tensor | None = None
    ) -> tuple[Tensor, tuple[Tensor, ...]] | None:
        """The whole weight, said to be of `dtype`; where there is `out`, it has what was filled anew."""
        codes, scales = outputs
        # A shard that ends within a block would bring a row of scales too many, and all after it be wrong.
        assert scales.shape[0] * BLOCK == codes.shape[:-1].numel(), (scales.shape, codes.shape)
        if out is None:
            return BlockWeight(codes.view(torch.float8_e4m3fn), scales, dtype), outputs
        whole = out._local_tensor if isinstance(out, DTensor) else out
        assert isinstance(whole, BlockWeight)
        assert whole.codes.data_ptr() == codes.data_ptr()
        return None
