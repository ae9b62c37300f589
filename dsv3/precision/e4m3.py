"""E4M3 codes (torch.float8_e4m3fn) from numbers in fp32 and back, without their scales."""

import torch
from torch import Tensor

LARGEST = 448.0
"""The largest number of E4M3 (torch.float8_e4m3fn); past it there is only NaN."""
NAN = 0x7F
"""Its code for what is not a number, but for the sign."""

# E4M3's bits seven places up, the sign at the top, are an fp16 number 2^-8 times as large, for fp16 has
# one exponent bit more and a bias of 15 for 7. Exact, subnormals included, and twenty times as fast as
# PyTorch's conversion on CPU. The scale takes the 2^8 back: the product is the same unless it overflows.
SHIFT, _WITHOUT_BIT_14, LIFT = 1 << 7, ~(1 << 14), 2.0**8


@torch.no_grad()
def values(codes: Tensor) -> Tensor:
    """What codes stand for without their scales, in fp32."""
    if codes.device.type != "cpu" or has_nan(codes):
        return codes.float()
    return shifted(codes).mul_(LIFT)


def encode(scaled: Tensor) -> Tensor:
    """The nearest E4M3 codes, ties to even; `scaled` itself is held at +-448."""
    # PyTorch 2.13 saturates on CPU by itself; nothing says that others do, where there is NaN past 448.
    return scaled.clamp_(-LARGEST, LARGEST).to(torch.float8_e4m3fn)


def encode_with_nan(scaled: Tensor) -> Tensor:
    """`encode` where there may be NaN, which has a sign of its own on each processor."""
    codes = encode(scaled)
    codes.view(torch.uint8).masked_fill_(scaled.isnan(), NAN)
    return codes


def has_nan(codes: Tensor) -> bool:
    """Whether any code is NaN; makes the host wait for a GPU."""
    return codes.numel() > 0 and int((codes.view(torch.uint8) | 0x80).amax()) == 0x80 | NAN


def shifted(codes: Tensor) -> Tensor:
    """Codes without NaN as fp32, times 2^-8."""
    half = codes.view(torch.int8).to(torch.int16).mul_(SHIFT).bitwise_and_(_WITHOUT_BIT_14)
    return half.view(torch.float16).float()
