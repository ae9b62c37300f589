"""Attention by blocks of queries against the formula in fp64."""

import pytest
import torch
from torch import Tensor

from dsv3.model.cpu_attention import BLOCK, blocked_attention
from tests.reference import normal

SCALE = 0.3


def written_out(given: list[Tensor], scale: float) -> Tensor:
    """Every score; the queries are the last tokens of the keys'."""
    q, k, v = given
    queries, keys = q.shape[1], k.shape[1]
    ahead = torch.ones(queries, keys, dtype=torch.bool).triu_(1 + keys - queries)
    scores = scale * torch.einsum("bihd,bjhd->bhij", q, k)
    return torch.einsum("bhij,bjhd->bihd", scores.masked_fill(ahead, -torch.inf).softmax(-1), v)


def inputs(queries: int, keys: int, dtype: torch.dtype) -> list[Tensor]:
    """q, k and v of two rows and three heads, 12 wide, values 8."""
    shapes = [(2, queries, 3, 12), (2, keys, 3, 12), (2, keys, 3, 8)]
    return [normal(*shape, seed=n).to(dtype).detach().requires_grad_() for n, shape in enumerate(shapes)]


@pytest.mark.parametrize(
    ("queries", "keys"),
    [(1, 1), (5, 5), (BLOCK, BLOCK), (BLOCK + 1, BLOCK + 1), (7, 300), (2 * BLOCK + 3, 400), (1, 200)],
)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 8e-3)])
def test_result_and_gradients_are_those_of_the_formula(
    queries: int, keys: int, dtype: torch.dtype, tolerance: float
) -> None:
    given = inputs(queries, keys, dtype)
    exact = [x.detach().double().requires_grad_() for x in given]
    found, expected = blocked_attention(*given, SCALE)[0], written_out(exact, SCALE)
    change = normal(*expected.shape, seed=9).detach()
    found.backward(change.to(dtype))
    expected.backward(change.to(dtype).double())
    pairs = [(found, expected), *((a.grad, b.grad) for a, b in zip(given, exact, strict=True))]
    for mine, right in pairs:
        assert mine is not None
        assert right is not None
        # With one key the weights are 1 and nothing moves them.
        assert (mine.double() - right).norm() <= tolerance * max(right.norm(), 0.5 * change.norm())


def test_what_autograd_keeps_does_not_grow_with_the_square() -> None:
    kept: list[int] = []

    def pack(x: Tensor) -> Tensor:
        kept.append(x.numel())
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        blocked_attention(*inputs(1024, 1024, torch.float32), 1.0)
    assert sum(kept) == 2 * 1024 * 3 * (12 + 12 + 8 + 8 + 1)


def test_the_operator_is_what_torch_expects_of_one() -> None:
    torch.library.opcheck(
        blocked_attention,
        (*inputs(5, 9, torch.float32), SCALE),
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )
