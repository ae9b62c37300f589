"""What only a real GPU can show: its kernels compute what the CPU computes, forward and backward.

benchmarks/gpu.py runs these first. On a simulated GPU they would compare one softmax with another.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from dsv3.config.model import AttentionKernel
from dsv3.model.attention_kernels import attention_kernel, document_segments
from dsv3.model.cpu_attention import blocked_attention
from dsv3.model.exact_linear import exact_linear
from dsv3.model.moe import permute_rows
from dsv3.parallel.prefix_attention import attend_to_prefix
from dsv3.training.optimizer import BF16MomentAdamW

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")

SCALE = 192**-0.5
HEADS, QK, V = 4, 192, 128
DOCUMENTS = torch.stack(
    [
        torch.repeat_interleave(torch.arange(4), torch.tensor([1, 200, 257, 54])),
        torch.zeros(512, dtype=torch.int64),
    ]
)

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def heads(rows: int, queries: int, keys: int, dtype: torch.dtype) -> list[Tensor]:
    """Random q, k and v; v is a view of a wider tensor, as in MLA."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((queries, QK), (keys, QK), (keys, V + 16))
    q, k, v = (torch.randn(rows, n, HEADS, width, generator=generator).to(dtype) for n, width in shapes)
    return [q, k, v[..., 16:]]


def require_equal(on_gpu: Attend, on_cpu: Attend, inputs: list[Tensor], tolerance: float) -> None:
    """Compare output and gradients, each by the norm of what the CPU computes in fp32."""
    found: list[Tensor] = []
    expected: list[Tensor] = []
    for attend, device, dtype, into in (
        (on_cpu, "cpu", torch.float32, expected),
        (on_gpu, "cuda", inputs[0].dtype, found),
    ):
        own = [x.detach().to(device, dtype).requires_grad_() for x in inputs]
        out = attend(own[0], own[1], own[2])
        gradient = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(device, dtype)
        into += [out, *torch.autograd.grad(out, own, gradient)]
    for mine, right in zip(found, expected, strict=True):
        assert (mine.cpu().float() - right).norm() <= tolerance * right.norm()


@pytest.mark.parametrize("packed", [False, True], ids=["whole rows", "documents"])
@pytest.mark.parametrize("name", list(AttentionKernel), ids=lambda kernel: kernel.value)
def test_every_kernel_attends_as_the_cpu_does(name: AttentionKernel, packed: bool) -> None:
    documents = DOCUMENTS if packed else None
    on_cpu, on_gpu = document_segments(documents), document_segments(documents)
    kernel, plain = attention_kernel(name), attention_kernel(AttentionKernel.sdpa)
    segments = on_gpu.to("cuda") if on_gpu is not None else None
    require_equal(
        lambda q, k, v: kernel(q, k, v, SCALE, segments),
        lambda q, k, v: plain(q, k, v, SCALE, on_cpu),
        heads(2, 512, 512, torch.bfloat16),
        0.02,
    )


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("packed", [False, True], ids=["whole rows", "documents"])
@pytest.mark.parametrize("start", [0, 128, 384])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_the_last_queries_of_longer_keys_attend_as_the_cpu_does(
    dtype: torch.dtype, start: int, packed: bool, deterministic: bool
) -> None:
    documents = DOCUMENTS if packed else None
    on_cpu, on_gpu = document_segments(documents), document_segments(documents)
    segments = on_gpu.to("cuda") if on_gpu is not None else None
    torch.use_deterministic_algorithms(deterministic, warn_only=True)
    try:
        require_equal(
            lambda q, k, v: attend_to_prefix(q, k, v, SCALE, start, segments),
            lambda q, k, v: attend_to_prefix(q, k, v, SCALE, start, on_cpu),
            heads(2, 128, 512, dtype),
            0.02 if dtype is torch.bfloat16 else 1e-4,
        )
    finally:
        torch.use_deterministic_algorithms(False)


def test_routers_are_exact_where_other_matmuls_take_tf32() -> None:
    x, weight = torch.randn(512, 1024, device="cuda"), torch.randn(64, 1024, device="cuda")
    right = x.double() @ weight.double().t()
    torch.set_float32_matmul_precision("high")
    try:
        exact, rounded = exact_linear(x, weight), x @ weight.t()
    finally:
        torch.set_float32_matmul_precision("highest")
    assert (exact - right).norm() < 1e-6 * right.norm()
    if torch.cuda.get_device_capability() >= (8, 0):
        assert (rounded - right).norm() > 1e-5 * right.norm()


def test_permuted_rows_come_back_with_their_gradients() -> None:
    x = torch.randn(1000, 64, device="cuda", requires_grad=True)
    order = torch.randperm(3000, device="cuda")
    out = permute_rows(x, order, order.argsort(), 3)
    gradient = torch.randn_like(out)
    expected = torch.zeros_like(x).index_add(0, order // 3, gradient)
    assert torch.equal(out, x[order // 3])
    assert torch.allclose(torch.autograd.grad(out, x, gradient)[0], expected, atol=1e-5)


def test_bf16_moments_step_as_on_the_cpu() -> None:
    """Fused on both devices, in chunks of whole and of cut parameters."""
    start = [torch.randn(shape) for shape in ((300, 70), (5,), ())]
    moved = []
    for device in ("cpu", "cuda"):
        own = [torch.nn.Parameter(x.to(device, copy=True)) for x in start]
        optimizer = BF16MomentAdamW(own, lr=0.01, fused=True)
        generator = torch.Generator().manual_seed(2)
        for _ in range(3):
            for parameter in own:
                parameter.grad = torch.randn(parameter.shape, generator=generator).to(device)
            optimizer.step()
        moved.append(own)
    for mine, right in zip(*moved, strict=True):
        assert torch.allclose(mine.cpu(), right, rtol=1e-5, atol=1e-6)


def test_attention_on_cpu_is_the_reference_that_these_tests_take() -> None:
    q, k, v = (x.float() for x in heads(1, 64, 64, torch.bfloat16))
    scores = SCALE * torch.einsum("bihd,bjhd->bhij", q, k)
    weights = scores.masked_fill(torch.ones(64, 64, dtype=torch.bool).triu(1), -torch.inf).softmax(-1)
    assert torch.allclose(
        blocked_attention(q, k, v, SCALE)[0], torch.einsum("bhij,bjhd->bihd", weights, v), atol=1e-5
    )
