"""The functional gather of CPU tensors that dsv3/distributed/torch_private.py puts in place of PyTorch's."""

import torch

from tests.parallel.gathering import gather, parts
from tests.parallel.pool import Pool


def test_a_functional_gather_is_the_groups_own_and_gives_every_ranks_rows(pool: Pool) -> None:
    expected = [torch.cat(of_ranks) for of_ranks in zip(*map(parts, range(8)), strict=True)]
    for found, calls in pool.run(gather):
        assert calls == len(expected)
        for mine, right in zip(found, expected, strict=True):
            assert mine.dtype is right.dtype
            assert torch.equal(mine, right)
