"""Worker side: functional all-gathers, and whether they go through the process group's own one."""

from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor


def parts(rank: int) -> list[Tensor]:
    """Return what a rank contributes: rows, one value, bytes, no rows, a non-contiguous view, bf16."""
    return [
        torch.arange(6.0).view(2, 3) + rank,
        torch.tensor([float(rank)]),
        torch.arange(4, dtype=torch.uint8).view(1, 4) + rank,
        torch.ones(0, 3),
        torch.arange(6.0).view(2, 3).t() * rank,
        torch.full((1, 2), rank, dtype=torch.bfloat16),
    ]


def gather() -> tuple[list[Tensor], int]:
    """All-gather every part; return the results and the number of calls of the process group's all-gather."""
    calls = []
    original = dist.ProcessGroup._allgather_base

    def spy(*arguments: Any) -> Any:
        calls.append(arguments)
        return original(*arguments)

    operators, group = torch.ops._c10d_functional, dist.group.WORLD
    assert group is not None
    with patch.object(dist.ProcessGroup, "_allgather_base", spy):
        found = [
            operators.wait_tensor(operators.all_gather_into_tensor(part, group.size(), group.group_name))
            for part in parts(group.rank())
        ]
    return found, len(calls)
