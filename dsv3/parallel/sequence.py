"""What a router is told where sequences are split over ranks (of the context and the tensor axis)."""

import torch.distributed as dist
from torch import Tensor

from dsv3.model.router import Router, WholeSequence
from dsv3.model.transformer import Transformer
from dsv3.parallel.collectives import all_reduce
from dsv3.parallel.mesh import ParallelMesh


class SplitSequence(WholeSequence):
    """A sequence whose parts lie on the ranks of `group`."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.shards = group.size()

    def sum(self, counts: Tensor) -> Tensor:
        """`counts` added up over the ranks of a sequence, without gradient."""
        return all_reduce(counts, self.group)


def split_sequences(model: Transformer, mesh: ParallelMesh) -> None:
    """Tell every router of `model` that the sequences it sees are parts."""
    if mesh.rows is not None:
        over = SplitSequence(mesh.rows.get_group("sequence"))
        for module in model.modules():
            if isinstance(module, Router):
                module.over_sequence = over
