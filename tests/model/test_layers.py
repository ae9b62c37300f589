"""RMSNorm, the dtype-following linear map and SwiGLU against arithmetic in fp64."""

import math

import pytest
import torch

from dsv3.model.layers import FeedForward, Linear, RMSNorm
from tests import reference
from tests.reference import assert_close, normal


def norm(weight: torch.Tensor, eps: float) -> RMSNorm:
    module = RMSNorm(len(weight), eps)
    module.weight.data = weight
    return module


@pytest.mark.parametrize("eps", [1e-6, 1e-2])
def test_rms_norm_adds_its_eps_to_the_mean_square(eps: float) -> None:
    # A constant vector c becomes c / sqrt(c^2 + eps).
    for value in (1e-3, 0.1, 5.0):
        found = norm(torch.ones(16), eps)(torch.full((2, 16), value))
        assert_close(found, torch.full((2, 16), value / math.sqrt(value**2 + eps)), 1e-6)


def test_rms_norm_of_bf16_is_the_exact_result_rounded_once() -> None:
    x = normal(64, 256).detach().bfloat16()
    weight = 1 + 0.3 * normal(256, seed=4).detach()
    exact = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight.double()
    found = norm(weight, 1e-5)(x)
    assert found.dtype == torch.bfloat16
    # fp32 may round the other way where the exact result lies half-way between two bf16 numbers.
    assert (found != exact.bfloat16()).float().mean() < 1e-3


def test_rms_norm_of_fp16_squares_without_overflow() -> None:
    found = norm(torch.ones(8), 1e-6)(torch.full((8,), 1000.0, dtype=torch.float16))
    assert found.tolist() == [1.0] * 8


def test_rms_norm_does_not_mix_positions() -> None:
    x = normal(3, 8).detach()
    module = norm(torch.ones(8), 1e-6)
    assert torch.equal(module(x)[1], module(x[1]))


def test_linear_has_no_bias_and_computes_in_the_dtype_of_its_input() -> None:
    module = Linear(8, 4)
    reference.randomize(module)
    assert [name for name, _ in module.named_parameters()] == ["weight"]
    x = normal(5, 8).detach().bfloat16().requires_grad_()
    out = module(x)
    assert out.dtype == torch.bfloat16
    assert_close(out, x.double() @ module.weight.double().T, 1e-2)
    out.sum().backward()
    assert module.weight.grad is not None
    assert module.weight.grad.dtype == torch.float32


def test_feed_forward_is_swiglu() -> None:
    module = FeedForward(8, 12)
    reference.randomize(module)
    x = normal(5, 8)
    expected = torch.stack([reference.feed_forward(module, vector) for vector in x])
    assert_close(module(x), expected)
    reference.assert_same_gradients(module(x), expected, [x, *module.parameters()])
