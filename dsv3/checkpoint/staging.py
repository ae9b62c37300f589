"""Host copies of a rank's tensors for a save in the background, in one piece of memory of exactly their size.

For tensors on a GPU the memory is pinned, so that the copies run at the full rate of the bus, all at once.
PyTorch's own pinned memory rounds each tensor up to a power of two, up to twice its size; here CUDA registers
memory that the system gave.
"""

import contextlib
import mmap
import weakref

import torch
from torch import Tensor

from dsv3.checkpoint.state import local_tensor
from dsv3.errors import RunFailed

ALIGNMENT = 64
"""Bytes to a multiple of which each copy begins, as in PyTorch's own CPU memory."""

PORTABLE = 1
"""cudaHostRegisterPortable: pinned for all contexts."""


class Staging:
    """Host memory for a rank's shard of every tensor, allocated once and used for every save."""

    def __init__(self) -> None:
        self.host_copies: dict[str, Tensor] = {}

    @torch.no_grad()
    def copy(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return a copy of this rank's shard of each tensor, by name; valid until the next call."""
        shards = {name: local_tensor(tensor) for name, tensor in tensors.items()}
        on_gpu = any(shard.is_cuda for shard in shards.values())
        if _shapes(shards) != _shapes(self.host_copies):
            self.host_copies = {}  # before the new ones take memory
            self.host_copies = allocate_like(shards, pinned=on_gpu)
        for name, shard in shards.items():
            self.host_copies[name].copy_(shard, non_blocking=True)
        if on_gpu:  # the next step overwrites the tensors while they are still being copied
            torch.cuda.current_stream().synchronize()
        return dict(self.host_copies)


def _shapes(tensors: dict[str, Tensor]) -> dict[str, tuple[torch.Size, torch.dtype]]:
    return {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}


def allocate_like(tensors: dict[str, Tensor], pinned: bool) -> dict[str, Tensor]:
    """Return contiguous CPU tensors of the same shapes and dtypes in one mapping, which lives while they do.

    Each has a storage of its own, of its own size: torch.save would write the whole of a shared one.
    """
    begins, end = {}, 0
    for name, tensor in tensors.items():
        begins[name] = end
        end += -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
    if not end:
        return {name: torch.empty(tensor.shape, dtype=tensor.dtype) for name, tensor in tensors.items()}
    memory = mmap.mmap(-1, end, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if pinned:
        _pin(memory, end)
    return {name: _view(memory, begins[name], tensor) for name, tensor in tensors.items()}


def _view(memory: mmap.mmap, begin: int, like: Tensor) -> Tensor:
    if not like.numel():
        return torch.empty(like.shape, dtype=like.dtype)
    flat = torch.frombuffer(memory, dtype=like.dtype, count=like.numel(), offset=begin)
    return flat.view(like.shape)


def _pin(memory: mmap.mmap, size: int) -> None:
    """Let CUDA copy to `memory` directly; RunFailed where the system has not so much to pin."""
    address = torch.frombuffer(memory, dtype=torch.uint8).data_ptr()
    status = int(torch.cuda.cudart().cudaHostRegister(address, size, PORTABLE))
    if status:
        raise RunFailed(
            f"{size / 2**30:,.1f} GiB of host memory for an async save cannot be pinned (CUDA error "
            f"{status}): free memory on this node, or take checkpoint.async_save=false"
        )
    # At the end of the process CUDA has gone, perhaps, and the system takes everything back.
    weakref.finalize(memory, _unpin, address).atexit = False


def _unpin(address: int) -> None:
    with contextlib.suppress(Exception):
        torch.cuda.cudart().cudaHostUnregister(address)
