"""A backward pass that a pipeline schedule splits: inputs first, weights later, nothing computed twice."""

import math

import torch
from torch import Tensor, nn
from torch.distributed.pipelining._backward import stage_backward_input, stage_backward_weight

from dsv3.fp8.convert_model import FP8GroupedLinear, FP8Linear, take_nonfinite_tiles
from dsv3.model.layers import Linear
from tests.harness.operators import Operators

CPU = torch.device("cpu")
ROWS, WEIGHTS = "fp8_rows_gradient", "fp8_weight_gradient"


class Layers(nn.Module):
    """Two linear layers with experts between."""

    def __init__(self, counts: bool = True) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        probe = torch.zeros((), requires_grad=counts)
        self.first, self.last = Linear(16, 16), Linear(16, 16)
        self.experts = nn.Parameter(torch.randn(2, 16, 16, generator=generator))
        self.grouped = FP8GroupedLinear(probe, "emulated", 128, False)
        for layer in (self.first, self.last):
            layer.matmul = FP8Linear(probe, "emulated", 128, False)
            nn.init.normal_(layer.weight, generator=generator)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layers to `x` [8, 16], of which three rows are the first expert's."""
        ends = torch.tensor([3, 8], dtype=torch.int32)
        out: Tensor = self.last(self.grouped(self.first(x).sigmoid(), self.experts, ends))
        return 2 * out


def products(seen: Operators) -> dict[str, int]:
    """Count the gradient operators of the backward pass that ran."""
    return {name: seen.names[name] for name in (ROWS, WEIGHTS) if name in seen.names}


def inputs() -> Tensor:
    return torch.randn(8, 16, generator=torch.Generator().manual_seed(1)).requires_grad_()


def test_each_gradient_is_computed_once_and_is_the_same() -> None:
    whole, split, x, y = Layers(), Layers(), inputs(), inputs()
    with Operators() as at_once:
        whole(x).sum().backward()
    assert products(at_once) == {ROWS: 3, WEIGHTS: 3}
    out = split(y)
    with Operators() as first:
        found, groups = stage_backward_input([out], [torch.ones_like(out)], [y], split.parameters())
    assert products(first) == {ROWS: 3}
    with Operators() as second:
        stage_backward_weight(split.parameters(), groups)
    assert products(second) == {WEIGHTS: 3}
    pairs = [(found[0], x.grad)]
    pairs += [(a.grad, b.grad) for a, b in zip(split.parameters(), whole.parameters(), strict=True)]
    for mine, right in pairs:
        assert mine is not None
        assert right is not None
        assert torch.equal(mine, right)


def test_broken_tiles_are_counted_as_at_once() -> None:
    whole, split, x, y = Layers(), Layers(), inputs(), inputs()
    gradient = torch.ones(8, 16)
    gradient[3, 5] = math.nan
    whole(x).backward(gradient)
    expected = take_nonfinite_tiles([whole], CPU)
    assert expected > 0
    for _ in range(2):  # microbatches
        out = split(y)
        _, groups = stage_backward_input([out], [gradient], [y], split.parameters())
        stage_backward_weight(split.parameters(), groups)
    assert take_nonfinite_tiles([split], CPU) == 2 * expected
    assert take_nonfinite_tiles([split], CPU).isnan()


def test_a_probe_without_a_gradient_counts_nothing() -> None:
    layers, x = Layers(counts=False), inputs()
    out = layers(x)
    _, groups = stage_backward_input([out], [torch.ones_like(out)], [x], layers.parameters())
    stage_backward_weight(layers.parameters(), groups)
    assert take_nonfinite_tiles([layers], CPU).isnan()
