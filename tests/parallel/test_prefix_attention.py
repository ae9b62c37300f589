"""Attention from the last queries of longer keys on CUDA, by kernels that a CPU has in their place."""

from typing import Any

import pytest
import torch
import torch.nn.attention.varlen
import torch.nn.functional as F
from torch import Tensor

from dsv3.distributed.torch_private import cudnn_attention, cudnn_attention_backward
from dsv3.model.attention_kernels import document_segments
from dsv3.model.cpu_attention import blocked_attention
from dsv3.parallel import prefix_attention
from dsv3.parallel.prefix_attention import FusedKernel, attend_to_prefix, prefix_spans, split_attention
from tests.reference import assert_close, assert_same_gradients, normal

SCALE = 0.3
# Documents that begin and end within, at and outside of the chunk of queries 12 to 23 of 32.
DOCUMENTS = torch.stack(
    [
        torch.repeat_interleave(torch.arange(4), torch.tensor([5, 9, 10, 8])),
        torch.repeat_interleave(torch.arange(3), torch.tensor([12, 12, 8])),
        torch.zeros(32, dtype=torch.int64),
    ]
)
START, QUERIES = 12, 12


class TorchCPUKernel:
    """PyTorch's flash kernel for CPU in cuDNN's place: it also returns and takes a log-sum-exp."""

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float
    ) -> tuple[Tensor, Tensor, tuple[Tensor | None, ...]]:
        assert not causal or q.shape[2] == k.shape[2]
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        out, log_sum = flash(q, k, v, 0.0, causal, scale=scale)
        return out, log_sum.unsqueeze(-1), (None, torch.zeros(()))

    def backward(self, gradient: Tensor, *saved: Any) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v, out, log_sum, state, causal, scale = saved
        assert len(state) == 2
        backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        found: tuple[Tensor, Tensor, Tensor] = backward(
            gradient, q, k, v, out, log_sum.squeeze(-1), 0.0, causal, scale=scale
        )
        return found


def heads(qk_head_dim: int, v_head_dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries 12 to 23 of three rows of 32 tokens, and all keys and values."""
    q, k = normal(3, QUERIES, 2, qk_head_dim, seed=1), normal(3, 32, 2, qk_head_dim, seed=2)
    return q, k, normal(3, 32, 2, v_head_dim, seed=3)


def test_two_calls_of_a_fused_kernel_merge_to_the_whole() -> None:
    q, k, v = heads(16, 16)
    end = START + QUERIES
    inputs = tuple(x.transpose(1, 2) for x in (q, k[:, :end], v[:, :end]))
    kernel = FusedKernel(TorchCPUKernel().forward, TorchCPUKernel().backward)
    found = split_attention(inputs[0], inputs[1], inputs[2], SCALE, kernel).transpose(1, 2)
    expected = blocked_attention(q, k[:, :end], v[:, :end], SCALE)[0]
    assert_close(found, expected)
    assert_same_gradients(found, expected, [q, k, v])


def test_cudnns_operators_take_what_they_are_given() -> None:
    """On meta tensors: PyTorch checks the arguments and tells the shapes."""
    sizes = ((2, 4, 8, 192), (2, 4, 20, 192), (2, 4, 20, 128))
    q, k, v = (torch.empty(size, device="meta", dtype=torch.bfloat16) for size in sizes)
    out, log_sum, state = cudnn_attention(q, k, v, False, SCALE)
    assert (out.shape, log_sum.shape, log_sum.dtype) == ((2, 4, 8, 128), (2, 4, 8, 1), torch.float32)
    gradients = cudnn_attention_backward(out, q, k, v, out, log_sum, state, False, SCALE)
    assert [x.shape for x in gradients] == list(sizes)


class OnCuda(Tensor):
    """A tensor that says of itself that it lies on a GPU."""

    is_cuda = True


@pytest.mark.parametrize(
    ("dtype", "cudnn", "taken"),
    [
        (torch.bfloat16, True, "split_attention"),
        (torch.bfloat16, False, "_lower_right"),
        (torch.float32, False, "_lower_right"),
    ],
)
def test_whole_rows_go_to_cudnn_where_it_takes_them(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, cudnn: bool, taken: str
) -> None:
    def record(name: str) -> Any:
        def attend(q: Tensor, *_: Any) -> Tensor:
            calls.append(name)
            return q

        return attend

    calls: list[str] = []
    monkeypatch.setattr(prefix_attention, "cudnn_takes", lambda *_: cudnn)
    for name in ("split_attention", "_lower_right", "sdpa"):
        monkeypatch.setattr(prefix_attention, name, record(name))
    q, k, v = (x.detach().to(dtype).as_subclass(OnCuda) for x in heads(12, 8))
    attend_to_prefix(q, k, v, SCALE, START, None)
    attend_to_prefix(q, k, v, SCALE, 0, None)  # as many queries as keys: the common kernel
    assert calls == [taken, "sdpa"]


def test_values_are_padded_for_flash_attention_and_not_in_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        widths.append((q.shape[-1], v.shape[-1]))
        return v

    widths: list[tuple[int, int]] = []
    monkeypatch.setattr(prefix_attention, "cudnn_takes", lambda *_: False)
    monkeypatch.setattr(F, "scaled_dot_product_attention", attend)
    for dtype in (torch.bfloat16, torch.float32):
        q, k, v = (x.detach().to(dtype).as_subclass(OnCuda) for x in heads(12, 8))
        assert attend_to_prefix(q, k, v, SCALE, START, None).shape[-1] == 8
    assert widths == [(12, 12), (12, 8)]


def test_documents_go_to_one_varlen_call_whose_queries_are_the_last_of_the_keys(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def flash(
        q: Tensor, k: Tensor, v: Tensor, of_q: Tensor, of_k: Tensor, most: int, longest: int, **options: Any
    ) -> Tensor:
        calls.append(options)
        assert q.shape[1:] == k.shape[1:] == v.shape[1:]
        assert of_q.dtype is of_k.dtype is torch.int32
        assert [most, longest] == [int(ends.diff().max()) for ends in (of_q, of_k)]
        ends = ((q, of_q), (k, of_k), (v, of_k))
        parts = zip(*(x.split(end.diff().tolist()) for x, end in ends), strict=True)
        outs = [blocked_attention(*(x.unsqueeze(0) for x in part), SCALE)[0] for part in parts]
        return torch.cat(outs, dim=1).squeeze(0)

    calls: list[Any] = []
    monkeypatch.setattr(torch.nn.attention.varlen, "varlen_attn", flash)
    monkeypatch.setattr(prefix_attention, "flash_takes", lambda *_: True)
    segments = document_segments(DOCUMENTS)
    q, k, v = heads(12, 8)
    gpu_q, gpu_k, gpu_v = (x.as_subclass(OnCuda) for x in (q, k, v))
    found = attend_to_prefix(gpu_q, gpu_k, gpu_v, SCALE, START, segments).as_subclass(Tensor)
    expected = attend_to_prefix(q, k, v, SCALE, START, segments)  # on CPU, one call a document
    assert calls == [{"scale": SCALE, "window_size": (-1, 0)}]
    assert_close(found, expected)
    assert_same_gradients(found, expected, [q, k, v])


def test_the_spans_of_a_chunk_are_made_once_for_all_layers() -> None:
    segments = document_segments(DOCUMENTS)
    assert segments is not None
    spans = prefix_spans(segments, 3, START, QUERIES)
    assert spans.keys == [slice(5, 24), slice(12, 24), slice(0, 24)]
    assert spans.cu_queries.tolist() == [0, 2, 12, 24, 36]
    assert spans.cu_keys.tolist() == [0, 9, 19, 31, 55]
    assert (spans.max_queries, spans.max_keys) == (12, 24)
    assert prefix_spans(segments, 3, START, QUERIES) is spans
