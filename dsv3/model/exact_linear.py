"""A linear map in exact fp32, whatever `precision.matmul` and autocast allow other matmuls.

Experts are chosen by scores that differ in the last bits: TF32 keeps 10 bits of an operand, and would send a
token elsewhere than fp32 does. The setting is one of the process, so it is set around each matmul here; an
operator of its own lets torch.compile do the same, and activation checkpointing see it as a whole.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor

EXACT = "highest"
"""The value of torch.set_float32_matmul_precision under which fp32 matmuls are exact."""


@torch.library.custom_op("dsv3::exact_linear", mutates_args=())
def exact_linear(x: Tensor, weight: Tensor) -> Tensor:
    """Return x W^T [..., out] for `x` [..., in] and `weight` [out, in], all in fp32."""
    with _in_exact_fp32(x.device.type):
        return F.linear(x, weight)


@torch.library.custom_op("dsv3::exact_linear_backward", mutates_args=())
def _backward(gradient: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of `x` and `weight` in exact fp32, as the forward matmul."""
    with _in_exact_fp32(x.device.type):
        of_weight = F.linear(gradient.flatten(0, -2).t(), x.flatten(0, -2).t())
        return F.linear(gradient, weight.t()), of_weight


@contextmanager
def _in_exact_fp32(device_type: str) -> Iterator[None]:
    """Compute fp32 matmuls exactly within; PyTorch's setting is the process's own again afterwards."""
    allowed = torch.get_float32_matmul_precision()
    if allowed != EXACT:
        torch.set_float32_matmul_precision(EXACT)
    try:
        # Autocast would turn the matmul into bf16.
        with torch.autocast(device_type, enabled=False):
            yield
    finally:
        if allowed != EXACT:
            torch.set_float32_matmul_precision(allowed)


@exact_linear.register_fake
def _(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


@_backward.register_fake
def _(gradient: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), weight.new_empty(weight.shape)


def _save(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    ctx.save_for_backward(*inputs)


def _differentiate(ctx, gradient):  # type: ignore[no-untyped-def]
    return _backward(gradient, *ctx.saved_tensors)


exact_linear.register_autograd(_differentiate, setup_context=_save)
