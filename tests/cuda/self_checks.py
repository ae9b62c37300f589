"""What the simulated GPU must refuse, and what it must note: each check raises where it does not.

They run in the process of run_cases.py; test_simulated_gpu.py asks for their results.
"""

import itertools
import re
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.cuda.ledger import LEDGER

GPU = torch.device("cuda", 0)


def refused(call: Callable[[], object], words: str) -> None:
    """Assert that a call raises an error with these words."""
    with pytest.raises(RuntimeError, match=re.escape(words)):
        call()


def waits(call: Callable[[], object]) -> int:
    """Return how often the host waits in a call."""
    before = LEDGER.waits.total()
    call()
    return LEDGER.waits.total() - before


def tensors_of_two_devices_are_refused() -> None:
    """Scalars on the CPU are taken, as on CUDA."""
    on_gpu, on_cpu = torch.ones(3, device=GPU), torch.ones(3)
    refused(lambda: on_gpu + on_cpu, "same device")
    refused(lambda: F.linear(on_gpu, torch.ones(3, 3)), "same device")
    refused(lambda: on_gpu + torch.ones(3, device="cuda:1"), "GPUs [0, 1]")
    assert (on_gpu + torch.tensor(2.0)).cpu().tolist() == [3.0] * 3


def reading_a_value_is_a_wait() -> None:
    """Each way of bringing a value to the host counts."""
    x = torch.arange(4.0, device=GPU)
    calls: list[tuple[Callable[[], object], int]] = [
        (x[0].item, 1),
        (x.tolist, 1),
        (x.cpu, 1),
        (lambda: bool(x.any()), 1),
        (x.nonzero, 1),
        (lambda: x[x > 1], 1),
        (lambda: torch.bincount(x.long()), 2),
        (lambda: torch.equal(x, x), 1),
        (x.unique, 1),
        (lambda: x + 1, 0),
        (lambda: torch.where(x > 1, x, -1.0), 0),
        (lambda: x.cumsum(0), 0),
        (lambda: x.topk(2), 0),
    ]
    for number, (call, expected) in enumerate(calls):
        assert waits(call) == expected, (number, waits(call), expected)


def an_upload_is_a_wait_unless_it_comes_from_pinned_memory_and_need_not_block() -> None:
    """torch.tensor(.., device=) blocks, and so does indexing by numbers of the host."""
    x, plain = torch.arange(4.0, device=GPU), torch.ones(3)
    assert waits(lambda: torch.tensor([1, 2], device=GPU)) == 1
    assert waits(lambda: x[[0, 2]]) == 1
    assert waits(lambda: plain.to(GPU)) == 1
    assert waits(lambda: plain.to(GPU, non_blocking=True)) == 1
    assert waits(lambda: plain.pin_memory().to(GPU, non_blocking=True)) == 0
    assert waits(lambda: plain.pin_memory().to(GPU)) == 1
    assert waits(lambda: torch.full((3,), 2.0, device=GPU)) == 0


def uploads_and_downloads_of_the_model_wait_no_longer_than_they_must() -> None:
    """model/transfers.py; what it copies arrives."""
    from dsv3.model.transfers import download, upload

    x = torch.arange(4.0)
    assert waits(lambda: upload(x, GPU)) == 0
    assert waits(lambda: download(upload(x, GPU))) == 1
    assert torch.equal(download(upload(x, GPU)), x)


def grouped_matmuls_refuse_operands_that_are_not_aligned() -> None:
    """Strides must be multiples of 16 bytes."""
    ends = torch.tensor([3, 8], dtype=torch.int32).pin_memory().to(GPU, non_blocking=True)

    def matmul(depth: int, dtype: torch.dtype) -> Tensor:
        rows = torch.ones(8, depth, device=GPU, dtype=dtype)
        weight = torch.ones(2, 16, depth, device=GPU, dtype=dtype)
        return F.grouped_mm(rows, weight.transpose(-2, -1), offs=ends)

    assert matmul(16, torch.bfloat16).cpu().unique().tolist() == [16.0]
    refused(lambda: matmul(12, torch.bfloat16), "multiples of 16 bytes")
    assert waits(lambda: matmul(16, torch.float32)) == 1
    assert waits(lambda: matmul(16, torch.bfloat16)) == 0


def operators_without_a_deterministic_kernel_are_refused_on_demand() -> None:
    """The sum of integers is exact in any order, and is not refused."""
    x = torch.ones(4, device=GPU)
    torch.use_deterministic_algorithms(True)
    try:
        refused(lambda: x.cumsum(0), "deterministic")
        assert x.long().cumsum(0).cpu().tolist() == [1, 2, 3, 4]
    finally:
        torch.use_deterministic_algorithms(False)


def every_attention_backend_has_the_numbers_and_gradients_of_the_cpu() -> None:
    """Causal attention against PyTorch's on the CPU, whole rows and documents."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    draw = torch.Generator().manual_seed(0)
    heads = [torch.randn(2, 3, 8, 16, generator=draw, dtype=torch.bfloat16) for _ in range(3)]
    expected = _differentiated([x.requires_grad_() for x in heads])
    for backend in (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION):
        LEDGER.kernels.clear()
        with sdpa_kernel([backend]):
            found = _differentiated([x.detach().to(GPU).requires_grad_() for x in heads])
        assert list(LEDGER.kernels) == [f"{backend.name.split('_')[0].lower()} 16/16"], LEDGER.kernels
        for ours, theirs in itertools.zip_longest(found, expected):
            assert (ours.cpu() - theirs).abs().max() < 0.05, backend


def _differentiated(heads: list[Tensor]) -> list[Tensor]:
    q, k, v = heads
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    return [out.detach(), *torch.autograd.grad(out.float().square().sum(), heads)]


def memory_counts_what_is_held_in_blocks() -> None:
    """512 bytes at least; freed tensors are given back."""
    from tests.cuda.ledger import MEMORY

    before = MEMORY.now
    x = torch.ones(129, device=GPU)
    assert MEMORY.now - before == 1024
    del x
    assert MEMORY.now == before


CHECKS: dict[str, Callable[[], None]] = {
    check.__name__: check
    for check in (
        tensors_of_two_devices_are_refused,
        reading_a_value_is_a_wait,
        an_upload_is_a_wait_unless_it_comes_from_pinned_memory_and_need_not_block,
        uploads_and_downloads_of_the_model_wait_no_longer_than_they_must,
        grouped_matmuls_refuse_operands_that_are_not_aligned,
        operators_without_a_deterministic_kernel_are_refused_on_demand,
        every_attention_backend_has_the_numbers_and_gradients_of_the_cpu,
        memory_counts_what_is_held_in_blocks,
    )
}
