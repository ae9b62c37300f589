"""Copies between host and device that wait no longer than they must.

A plain copy of a CPU tensor to a GPU, `torch.tensor(.., device="cuda")` included, makes the host wait until the
GPU has done all that it was given before: the queue that keeps it busy runs empty. From pinned memory the copy
joins the queue, and the host goes on. The other way round somebody must wait for the values; `download` waits
for them alone.
"""

import torch
from torch import Tensor


def upload(x: Tensor, device: torch.device | str) -> Tensor:
    """Copy `x` to `device` without waiting, through pinned memory from a CPU to a GPU."""
    if x.device.type == "cpu" and torch.device(device).type == "cuda":
        # The pinned copy may be freed at once: PyTorch keeps its memory until the GPU has read it.
        return x.pin_memory().to(device, non_blocking=True)
    return x.to(device, non_blocking=True)


def download(x: Tensor) -> Tensor:
    """Copy `x` to the CPU; the host waits until the device has computed it."""
    if not x.is_cuda:
        return x.cpu()
    copy = torch.empty_like(x, device="cpu", pin_memory=True)
    copy.copy_(x, non_blocking=True)
    arrived = torch.cuda.Event()
    arrived.record()
    arrived.synchronize()
    return copy
