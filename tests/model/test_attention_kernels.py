"""Attention kernels against softmax(scale * q k^T) v written out with its mask."""

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.attention.varlen
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend
from torch.nn.attention.flex_attention import create_block_mask

from dsv3.config.model import AttentionKernel
from dsv3.errors import UserError
from dsv3.model import attention_kernels
from dsv3.model.attention_kernels import (
    attention_kernel,
    check_kernel,
    document_mask,
    document_segments,
    explain_kernel,
)
from tests.harness.operators import Operators
from tests.harness.tiny import model_config
from tests.reference import assert_close, assert_same_gradients, normal

SCALE = 0.7
# Two rows of 300 tokens: documents of one token, of whole rows, and across blocks of flex.
DOCUMENTS = torch.stack(
    [
        torch.repeat_interleave(torch.arange(4), torch.tensor([1, 140, 158, 1])),
        torch.zeros(300, dtype=torch.int64),
    ]
)
ON_CPU = [AttentionKernel.auto, AttentionKernel.sdpa]
HEAD_DIMS = {"mla": (12, 8), "one width": (8, 8), "wider values": (6, 20)}


def heads(
    qk_head_dim: int, v_head_dim: int, sequence: int = 300, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v of two rows and two heads; v is a view of a wider tensor, as in MLA."""
    q, k = (normal(2, sequence, 2, qk_head_dim, seed=seed).to(dtype) for seed in (1, 2))
    return q, k, normal(2, sequence, 2, 4 + v_head_dim, seed=3).to(dtype)[..., 4:]


def written_out(q: Tensor, k: Tensor, v: Tensor, documents: Tensor | None) -> Tensor:
    """Every score, then the mask."""
    allowed = torch.ones(q.shape[1], q.shape[1], dtype=torch.bool).tril().repeat(len(q), 1, 1)
    if documents is not None:
        allowed &= documents[:, :, None] == documents[:, None, :]
    scores = SCALE * torch.einsum("bihd,bjhd->bhij", q, k)
    return torch.einsum("bhij,bjhd->bihd", scores.masked_fill(~allowed[:, None], -torch.inf).softmax(-1), v)


class Recorder(Operators):
    """Keeps the most numbers that one of them gave out too."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0

    def saw(self, name: str, args: Any, result: Any) -> None:
        for one in result if isinstance(result, tuple | list) else [result]:
            if isinstance(one, Tensor):
                self.largest = max(self.largest, one.numel())


@pytest.mark.parametrize("documents", [None, DOCUMENTS], ids=["whole rows", "documents"])
@pytest.mark.parametrize("dims", HEAD_DIMS.values(), ids=HEAD_DIMS)
@pytest.mark.parametrize("name", ON_CPU)
def test_kernels_are_causal_softmax_attention_within_documents(
    name: AttentionKernel, dims: tuple[int, int], documents: Tensor | None
) -> None:
    q, k, v = heads(*dims)
    found = attention_kernel(name)(q, k, v, SCALE, document_segments(documents))
    expected = written_out(q, k, v, documents)
    assert_close(found, expected)
    assert_same_gradients(found, expected, [q, k, v])


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("documents", [None, DOCUMENTS], ids=["whole rows", "documents"])
@pytest.mark.parametrize("dims", HEAD_DIMS.values(), ids=HEAD_DIMS)
def test_flex_gives_what_sdpa_gives(dims: tuple[int, int], documents: Tensor | None) -> None:
    segments = document_segments(documents)
    q, k, v = (x.detach() for x in heads(*dims))
    found = attention_kernel(AttentionKernel.flex)(q, k, v, SCALE, segments)
    assert_close(found, attention_kernel(AttentionKernel.sdpa)(q, k, v, SCALE, segments))


@pytest.mark.parametrize("name", ON_CPU)
def test_the_same_call_gives_the_same_bits(name: AttentionKernel) -> None:
    def call() -> list[Tensor]:
        inputs = heads(12, 8, dtype=torch.bfloat16)
        out = attention_kernel(name)(*inputs, SCALE, document_segments(DOCUMENTS))
        return [out, *torch.autograd.grad(out.float().square().sum(), inputs)]

    assert all(map(torch.equal, call(), call()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("packed", [False, True])
def test_cpu_runs_one_operator_that_gives_out_nothing_as_large_as_the_square(
    packed: bool, dtype: torch.dtype
) -> None:
    sequence = 2048
    documents = torch.arange(2 * sequence).view(2, sequence) // 1500 if packed else None
    inputs = heads(12, 8, sequence, dtype)
    with Recorder() as seen:
        out = attention_kernel(AttentionKernel.sdpa)(*inputs, SCALE, document_segments(documents))
        torch.autograd.grad(out.sum(), inputs)
    assert {"blocked_attention", "blocked_attention_backward"} <= set(seen.names)
    assert not {"bmm", "mm", "_softmax", "_safe_softmax"} & set(seen.names)
    assert seen.largest == inputs[0].numel()


def test_the_block_mask_is_that_of_every_pair_worked_out_without_the_pairs() -> None:
    documents = torch.stack([torch.arange(700) // 300, torch.arange(700) // 130])
    segments = document_segments(documents)
    assert segments is not None
    with Recorder() as seen:
        found = document_mask(segments.starts)
    assert seen.largest <= documents.numel()

    def visible(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key <= query) & (documents[row, query] == documents[row, key])

    expected = create_block_mask(visible, 2, None, 700, 700, device="cpu")
    assert found.seq_lengths == expected.seq_lengths
    for ours, theirs in (
        (listed(found.kv_num_blocks, found.kv_indices), listed(expected.kv_num_blocks, expected.kv_indices)),
        (
            listed(found.full_kv_num_blocks, found.full_kv_indices),
            listed(expected.full_kv_num_blocks, expected.full_kv_indices),
        ),
    ):
        assert any(ours)
        assert ours == theirs


def listed(counts: Tensor | None, numbers: Tensor | None) -> list[list[int]]:
    """The key blocks of each query block, in order of rows and queries."""
    assert counts is not None
    assert numbers is not None
    pairs = zip(counts.flatten().tolist(), numbers.flatten(0, 2).tolist(), strict=True)
    return [sorted(row[:count]) for count, row in pairs]


@pytest.mark.parametrize("documents", [None, DOCUMENTS], ids=["whole rows", "documents"])
def test_varlen_hands_flash_attention_the_documents_end_to_end(
    monkeypatch: pytest.MonkeyPatch, documents: Tensor | None
) -> None:
    def flash(
        q: Tensor, k: Tensor, v: Tensor, begin: Tensor, end: Tensor, most: int, longest: int, **options: Any
    ) -> Tensor:
        assert q.shape == k.shape == v.shape
        assert begin.dtype is end.dtype is torch.int32
        assert most == longest == begin.diff().max()
        assert options == {"scale": SCALE, "window_size": (-1, 0)}
        qs, ks, vs = (x.unsqueeze(0).split(begin.diff().tolist(), dim=1) for x in (q, k, v))
        parts = [written_out(*part, None) for part in zip(qs, ks, vs, strict=True)]
        return torch.cat(parts, dim=1).squeeze(0)

    monkeypatch.setattr(torch.nn.attention.varlen, "varlen_attn", flash)
    q, k, v = heads(12, 8)
    found = attention_kernel(AttentionKernel.varlen)(q, k, v, SCALE, document_segments(documents))
    assert_close(found, written_out(q, k, v, documents))


class OnCuda(Tensor):
    """A tensor that says of itself that it lies on a GPU."""

    is_cuda = True


def on_cuda(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v with V3's head dims."""
    q, k, v = heads(192, 128, 4, dtype)
    return q.as_subclass(OnCuda), k.as_subclass(OnCuda), v.as_subclass(OnCuda)


@pytest.mark.parametrize(
    ("dtype", "packed", "flash", "expected"),
    [
        (torch.bfloat16, True, True, "varlen"),
        (torch.bfloat16, True, False, "sdpa"),
        (torch.bfloat16, False, True, "sdpa"),
    ],
)
def test_auto_takes_varlen_for_documents_where_the_gpu_can(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, packed: bool, flash: bool, expected: str
) -> None:
    taken = []
    monkeypatch.setattr(attention_kernels, "flash_takes", lambda *_: flash)
    for name in ("varlen", "sdpa"):
        monkeypatch.setattr(attention_kernels, name, lambda *_, name=name: taken.append(name))
    segments = document_segments(DOCUMENTS if packed else None)
    attention_kernel(AttentionKernel.auto)(*on_cuda(dtype), SCALE, segments)
    assert taken == [expected]


@pytest.mark.parametrize(
    ("kernel", "device", "documents", "cp", "flash", "told"),
    [
        (
            "auto",
            "cuda",
            True,
            1,
            True,
            ("varlen", "documents are masked, and FlashAttention takes heads of"),
        ),
        ("auto", "cuda", True, 1, False, ("sdpa", "documents are masked")),
        ("auto", "cuda", False, 1, True, ("sdpa", "rows are attended whole")),
        ("sdpa", "cuda", True, 1, True, ("sdpa", "kernel=sdpa; documents are masked")),
        ("flex", "cuda", True, 1, True, ("flex", "kernel=flex")),
        ("auto", "cpu", True, 1, True, ("blocks of queries", "the device is a CPU; documents are masked")),
        ("flex", "cuda", False, 2, True, ("cudnn", "the gathered keys of 2 ranks")),
        ("auto", "cuda", True, 2, True, ("varlen", "the gathered keys of 2 ranks")),
        ("auto", "cuda", True, 2, False, ("sdpa", "the gathered keys of 2 ranks")),
    ],
)
def test_the_kernel_that_is_taken_is_told_with_its_reason(
    monkeypatch: pytest.MonkeyPatch,
    kernel: str,
    device: str,
    documents: bool,
    cp: int,
    flash: bool,
    told: tuple[str, str],
) -> None:
    monkeypatch.setattr(attention_kernels, "flash_takes", lambda *_: flash)
    monkeypatch.setattr(attention_kernels, "cudnn_takes", lambda *_: True)
    config = replace(model_config().attention, kernel=AttentionKernel[kernel])
    name, reason = explain_kernel(config, torch.device(device), torch.bfloat16, documents, cp)
    assert name == told[0]
    assert told[1] in reason


@pytest.mark.parametrize(
    ("dtype", "cudnn", "width"),
    [(torch.bfloat16, True, 128), (torch.bfloat16, False, 192), (torch.float32, False, 128)],
)
def test_values_are_padded_on_cuda_only_where_no_fused_kernel_takes_them_narrow(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, cudnn: bool, width: int
) -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        given.append(v)
        return v

    given: list[Tensor] = []
    monkeypatch.setattr(attention_kernels, "cudnn_takes", lambda *_: cudnn)
    monkeypatch.setattr(F, "scaled_dot_product_attention", attend)
    out = attention_kernel(AttentionKernel.sdpa)(*on_cuda(dtype), SCALE, None)
    assert (out.shape[-1], given[0].shape[-1]) == (128, width)
    # cuDNN refuses values that are a view of a wider tensor.
    assert given[0].transpose(1, 2).is_contiguous()


@pytest.mark.parametrize(("packed", "first"), [(False, SDPBackend.CUDNN_ATTENTION), (True, None)])
def test_cudnn_comes_first_for_two_widths_and_never_sees_documents(
    monkeypatch: pytest.MonkeyPatch, packed: bool, first: SDPBackend | None
) -> None:
    """It makes a plan for every new length, and some releases of PyTorch ask it after a slower kernel."""

    def attend(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        order = torch._C._get_sdp_priority_order()
        enabled.append(SDPBackend(order[0]) if torch.backends.cuda.cudnn_sdp_enabled() else None)
        widths.append((q.shape[-1], v.shape[-1]))
        return v

    enabled: list[SDPBackend | None] = []
    widths: list[tuple[int, int]] = []
    monkeypatch.setattr(attention_kernels, "cudnn_takes", lambda *_: True)
    monkeypatch.setattr(F, "scaled_dot_product_attention", attend)
    documents = torch.tensor([[0, 0, 1, 1], [0, 1, 1, 1]]) if packed else None
    segments = document_segments(documents)
    out = attention_kernel(AttentionKernel.sdpa)(*on_cuda(torch.bfloat16), SCALE, segments)
    assert out.shape == (2, 4, 2, 128)
    assert enabled == [first] * (4 if packed else 1)
    assert set(widths) == {(192, 192) if packed else (192, 128)}
    assert torch.backends.cuda.cudnn_sdp_enabled()


def test_pytorch_is_asked_once_what_cudnn_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every layer wants to know in every pass, and each question allocates tensors on the device."""
    # On CPU the answer is known; the call is the one that a GPU decides by.
    asked: list[Any] = []

    def ask(parameters: torch.backends.cuda.SDPAParams) -> bool:
        asked.append(parameters)
        return torch.backends.cuda.can_use_cudnn_attention(parameters)

    monkeypatch.setattr(attention_kernels, "can_use_cudnn_attention", ask)
    attention_kernels._ask_cudnn.cache_clear()
    for _ in range(3):
        assert not attention_kernels.cudnn_takes(torch.device("cpu"), torch.bfloat16, 192, 128)
    assert len(asked) == 1
    # cuDNN's backward pass is not deterministic, and the answer then another one.
    torch.use_deterministic_algorithms(True)
    try:
        attention_kernels.cudnn_takes(torch.device("cpu"), torch.bfloat16, 192, 128)
    finally:
        torch.use_deterministic_algorithms(False)
    assert len(asked) == 2


def test_segments_are_the_runs_of_equal_numbers_of_each_row() -> None:
    documents = torch.tensor([[0, 0, 0, 1, 1, 2], [2, 2, 2, 2, 2, 2], [0, 1, 2, 2, -1, -1]])
    segments = document_segments(documents)
    assert segments is not None
    assert segments.lengths == [3, 2, 1, 6, 1, 1, 2, 2]
    assert segments.max_seqlen == 6
    assert segments.cu_seqlens.tolist() == [0, 3, 5, 6, 12, 13, 14, 16, 18]
    assert segments.starts.tolist() == [[0, 0, 0, 3, 3, 5], [0] * 6, [0, 1, 2, 2, 4, 4]]
    assert document_segments(None) is None


BF16, FP32 = torch.bfloat16, torch.float32
MISTAKES = [
    ("varlen", "cpu", True, BF16, "is not possible: it runs on CUDA alone; cpu has auto or sdpa"),
    (
        "varlen",
        "cpu",
        False,
        BF16,
        "is not possible: it runs on CUDA alone; cpu has auto, sdpa or flex",
    ),
    ("varlen", "cuda", True, FP32, "take precision=bf16, or auto, sdpa or flex"),
    ("flex", "cpu", True, FP32, "is not possible: .*no backward.*; cpu has auto or sdpa"),
]


@pytest.mark.parametrize(("name", "device", "trains", "dtype", "message"), MISTAKES)
def test_a_kernel_that_the_device_lacks_is_refused(
    name: str, device: str, trains: bool, dtype: torch.dtype, message: str
) -> None:
    with pytest.raises(UserError, match=rf"^model\.attention\.kernel={name} .*{message}") as told:
        check_kernel(AttentionKernel(name), device, trains, dtype)
    assert "\n" not in str(told.value)


def test_every_other_kernel_is_allowed() -> None:
    refused = {mistake[:3] for mistake in MISTAKES if mistake[1] == "cpu"}
    for kernel in AttentionKernel:
        for device in ("cpu", "cuda"):
            for trains in (True, False):
                if (kernel.value, device, trains) not in refused:
                    check_kernel(kernel, device, trains, BF16)
