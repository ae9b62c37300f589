"""Host copies for background saves: their size, their pinning, and what a save writes of them."""

import gc
import io
import mmap
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from dsv3.checkpoint import staging
from dsv3.checkpoint.staging import ALIGNMENT, Staging, allocate_like
from dsv3.errors import RunFailed

TENSORS = {
    "weight": torch.arange(5 * 33, dtype=torch.float32).view(5, 33),
    "transposed": torch.arange(12.0).view(3, 4).t(),
    "moment": torch.full((7,), 1.5, dtype=torch.bfloat16),
    "step": torch.tensor(3.0),
    "empty": torch.empty(0, 4),
    "random": torch.get_rng_state(),
}


class CUDARuntime:
    """Stands in for CUDA's runtime library; `status` is what registering returns."""

    def __init__(self, status: int = 0) -> None:
        self.status = status
        self.registered: dict[int, int] = {}

    def cudaHostRegister(self, address: int, size: int, flags: int) -> int:  # noqa: N802
        if not self.status:
            self.registered[address] = size
        return self.status

    def cudaHostUnregister(self, address: int) -> int:  # noqa: N802
        del self.registered[address]
        return 0


def test_copies_take_exactly_their_size_in_one_mapping(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []

    def mapped(file: int, size: int, flags: int) -> mmap.mmap:
        sizes.append(size)
        return mmap.mmap(file, size, flags=flags)

    monkeypatch.setattr(staging, "mmap", SimpleNamespace(**vars(mmap) | {"mmap": mapped}))
    copies = allocate_like(TENSORS, pinned=False)
    exact = sum(tensor.nbytes for tensor in TENSORS.values())
    assert len(sizes) == 1
    assert exact <= sizes[0] < exact + len(TENSORS) * ALIGNMENT
    for name, copy in copies.items():
        assert (copy.shape, copy.dtype) == (TENSORS[name].shape, TENSORS[name].dtype)
        assert copy.is_contiguous()
        assert copy.data_ptr() % ALIGNMENT == 0


def test_a_save_writes_a_copy_and_not_its_neighbours() -> None:
    copies = Staging().copy(TENSORS)
    for name, copy in copies.items():
        assert copy.untyped_storage().nbytes() == copy.nbytes
        assert torch.equal(copy, TENSORS[name])
        written = io.BytesIO()
        torch.save(copy, written)
        assert len(written.getvalue()) < copy.nbytes + 4096


def test_every_save_uses_the_same_memory_until_a_tensor_changes_its_shape() -> None:
    kept = Staging()
    first = kept.copy(TENSORS)
    more = {name: tensor + 1 for name, tensor in TENSORS.items()}
    second = kept.copy(more)
    assert [a.data_ptr() for a in first.values()] == [b.data_ptr() for b in second.values()]
    assert all(torch.equal(copy, more[name]) for name, copy in second.items())
    third = kept.copy({"weight": torch.ones(2, 2)})
    assert list(third) == ["weight"]
    assert torch.equal(third["weight"], torch.ones(2, 2))


def test_memory_for_a_gpu_is_registered_once_and_released_with_the_copies(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    runtime = CUDARuntime()
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    copies = allocate_like(TENSORS, pinned=True)
    ((address, size),) = runtime.registered.items()
    for copy in copies.values():
        assert not copy.numel() or address <= copy.data_ptr() <= address + size - copy.nbytes
    del copy
    copies.clear()
    gc.collect()
    assert not runtime.registered


def test_memory_that_the_system_does_not_pin_is_told_with_the_way_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "cudart", lambda: CUDARuntime(status=2))
    with pytest.raises(RunFailed, match=r"GiB .* \(CUDA error 2\): .*checkpoint\.async_save=false"):
        allocate_like(TENSORS, pinned=True)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="pinned memory needs a GPU")
def test_copies_of_a_gpus_tensors_are_pinned_and_right() -> None:
    kept, tensor = Staging(), torch.arange(1000.0, device="cuda")
    copy: Tensor = kept.copy({"a": tensor})["a"]
    assert copy.is_pinned()
    tensor.zero_()
    assert torch.equal(copy, torch.arange(1000.0))
