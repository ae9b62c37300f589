"""Refuse weights with values that are not finite (NaN, infinity) as they are read.

A model computes nothing with them, and training would blame the learning rate. Each slice is looked at once,
while it is in memory: `aminmax` takes it at 18 GB/s and more on one core, several times as fast as a disk.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from dsv3.errors import RunFailed, UserError, quoted
from dsv3.hf.pread_file import fault

_CODE_BITS, _NAN_CODE = 0x7F, 0x7F
"""E4M3's bits without the sign, and its code for NaN; it has no infinity."""


def is_finite(values: Tensor) -> bool:
    """Return whether every value is finite, of fp8 codes without their scales; any dtype and strides."""
    if not values.numel():
        return True
    if values.dtype is torch.float8_e4m3fn:
        return int((values.view(torch.uint8) & _CODE_BITS).amax()) != _NAN_CODE
    low, high = torch.aminmax(values)  # both are NaN where any value is
    return bool(low.isfinite() & high.isfinite())


def require_finite(
    values: Tensor,
    place: Path,
    name: str,
    origin: tuple[int, ...] = (),
    stored: Callable[[], Tensor] | None = None,
) -> None:
    """Raise UserError unless every value of a slice of weights is finite.

    `origin` is where the slice begins in the tensor `name` of `place`, by dim; without it, at its start.
    `stored` gives the slice in fp32 where `values` were rounded from it: it may have overflowed.
    """
    if not is_finite(values):
        raise nonfinite(values, values.float() if stored is None else stored(), place, name, origin)


def require_finite_export(rounded: Tensor, weights: Tensor, name: str, origin: Sequence[int]) -> None:
    """Raise RunFailed unless every value of a slice of a live model's weights is finite as it is exported.

    `origin` is where the slice begins in the parameter `name`, by dim; `weights` are the values before they
    were rounded, on any device.
    """
    if is_finite(rounded):
        return
    values = weights.detach().float().cpu()
    wrong = ~values.isfinite()
    overflows = not bool(wrong.any())
    if overflows:
        wrong = ~rounded.isfinite()
    first = wrong.nonzero()[0].tolist()
    index = [begin + offset for begin, offset in zip(origin, first, strict=True)]
    what = f"'{name}' has the value {values[tuple(first)].item():.6g} at {index}"
    if overflows:
        what += f", which overflows in {str(rounded.dtype).removeprefix('torch.')}"
        raise RunFailed(f"{what}: train.export_hf_dtype=fp32 keeps it")
    raise RunFailed(
        f"{what}, {int(wrong.sum())} of {wrong.numel()} there are not finite: the model is broken"
    )


def require_finite_in_bf16(values: Tensor, name: str, first: int) -> None:
    """Raise UserError for a value of rows from `first` on of a matrix that overflows in bf16.

    Readers of fp8 weights compute with them in bf16, which has a smaller largest number than fp32.
    """
    low, high = torch.aminmax(values)
    if bool(torch.stack([low, high]).bfloat16().isfinite().all()):
        return
    row, column = (~values.bfloat16().isfinite()).nonzero()[0].tolist()
    what = f"'{name}' has the value {values[row, column].item():.6g} at {[first + row, column]}"
    raise UserError(f"{what}, which overflows in bf16, in which fp8 weights are read: the type fp32 keeps it")


def nonfinite(values: Tensor, stored: Tensor, place: Path, name: str, origin: tuple[int, ...]) -> UserError:
    """Return the error that names the first value of a slice that is not finite, or not so in bf16.

    `stored` are the `values` in fp32, before any rounding to bf16.
    """
    wrong = ~stored.isfinite()
    overflows = not bool(wrong.any())
    if overflows:
        wrong = ~values.isfinite()
    first = wrong.nonzero()[0].tolist()
    origin = (*origin, *(0,) * (len(first) - len(origin)))
    index = [begin + offset for begin, offset in zip(origin, first, strict=True)]
    value = stored[tuple(first)].item()
    if overflows:
        what = f"has {quoted(name)} with the value {value:.6g} at {index}"
        return fault(place, f"{what}, which is finite there and overflows in bf16: dtype=fp32 keeps it")
    what = f"has {quoted(name)} with the value {value} at {index}, {int(wrong.sum())} of {wrong.numel()} read"
    return fault(place, f"{what} there are not finite: no model computes with them, take intact weights")
