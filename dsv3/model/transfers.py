"""Copies between host and device that wait no longer than they must.

A plain copy of a CPU tensor to a GPU makes the host wait until the GPU has done all that it was given
before, and so does `torch.tensor(.., device="cuda")`: the queue that keeps a GPU busy runs empty. From
pinned memory the copy joins the queue, and the host goes on. The other way round somebody must wait for the
values: `download` waits for them and for what was queued before them, so call it as early as they are known,
and for all of them at once.

tests/cuda counts both on a simulated GPU; docs/gpu.md has the table of all places where the host waits.
"""

import torch
from torch import Tensor


def upload(x: Tensor, device: torch.device | str) -> Tensor:
    """Copy `x` to `device` without waiting, through pinned memory from a CPU to a GPU.

    A later change of `x` on the host does not reach a GPU's copy. Numbers of Python's come as
    `upload(torch.tensor(numbers), device)`.
    """
    if x.device.type == "cpu" and torch.device(device).type == "cuda":
        # The pinned copy may be freed at once: PyTorch keeps its memory until the GPU has read it.
        return x.pin_memory().to(device, non_blocking=True)
    return x.to(device, non_blocking=True)


def download(x: Tensor) -> Tensor:
    """Copy `x` to the CPU; the host waits until the device has computed it.

    The event lets it wait for this copy alone: another stream's work, such as FSDP's all-gathers, goes on.
    """
    if not x.is_cuda:
        return x.cpu()
    copy = torch.empty_like(x, device="cpu", pin_memory=True)
    copy.copy_(x, non_blocking=True)
    arrived = torch.cuda.Event()
    arrived.record()
    arrived.synchronize()
    return copy
