"""Generation from the latent cache against the forward pass that sees everything at once."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor

from dsv3.model.attention import LatentAttention
from dsv3.model.generation import CachedLogits, inference, last_logits
from dsv3.model.kv_cache import LatentCache
from dsv3.model.transformer import Transformer
from tests.reference import ATTENTION, MODEL, SOFTMAX_MOE, YARN, tiny_model, tokens

DIRECT = replace(ATTENTION, q_lora_rank=None, v_head_dim=10)
CONFIGS = {
    "v3": replace(MODEL, num_layers=3),
    # 24 tokens are three times the length that YaRN starts from.
    "v3 with yarn": replace(MODEL, rope=replace(YARN, original_sequence_length=8)),
    "v2-lite": replace(MODEL, attention=DIRECT, moe=SOFTMAX_MOE, mtp_depths=0, rope=YARN),
}


def new_cache(
    model: Transformer, batch: int, capacity: int, dtype: torch.dtype = torch.float32
) -> LatentCache:
    return LatentCache(model.config, batch, capacity, dtype, torch.device("cpu"))


def next_logits(model: Transformer, new: list[list[int]], cache: LatentCache) -> Tensor:
    found = CachedLogits(partial(last_logits, model), cache)(new)
    assert found is not None
    return found


def cached(model: Transformer, ids: Tensor, chunks: Sequence[Sequence[int]]) -> list[Tensor]:
    """Logits after every chunk, the tokens of which are given as one count a row."""
    cache, found = new_cache(model, len(ids), ids.shape[1]), []
    with inference(model):
        for counts in chunks:
            starts = list(cache.lengths)
            new = [row[a : a + n].tolist() for row, a, n in zip(ids, starts, counts, strict=True)]
            found.append(next_logits(model, new, cache))
    return found


def whole(model: Transformer, ids: Tensor) -> Tensor:
    with inference(model):
        return model(ids).logits  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize(
    "sizes", [[1] * 24, [9] + [1] * 15, [5, 7, 1, 11]], ids=["tokens", "prefill", "chunks"]
)
def test_prefill_and_decode_give_the_logits_of_the_whole_forward_pass(name: str, sizes: list[int]) -> None:
    model, ids = tiny_model(CONFIGS[name]), tokens(2, 24)
    expected, place = whole(model, ids), 0
    for size, found in zip(sizes, cached(model, ids, [[n, n] for n in sizes]), strict=True):
        place += size
        torch.testing.assert_close(found, expected[:, place - 1], rtol=0, atol=1e-4)


def test_rows_of_different_lengths_have_their_own_positions_and_do_not_see_padding() -> None:
    model, ids = tiny_model(CONFIGS["v3 with yarn"]), tokens(3, 24)
    # Ragged at the beginning and later, and a row that is as long as all others are short.
    chunks = [[2, 9, 5], [1, 1, 1], [4, 1, 2], [1, 1, 1], [1, 1, 1], [3, 3, 3]]
    expected, ends = whole(model, ids), torch.zeros(3, dtype=torch.long)
    for counts, found in zip(chunks, cached(model, ids, chunks), strict=True):
        ends += torch.tensor(counts)
        torch.testing.assert_close(found, expected[range(3), ends - 1], rtol=0, atol=1e-4)


def test_a_token_leaves_576_numbers_a_layer_with_the_widths_of_v3_and_nothing_else() -> None:
    attention = replace(ATTENTION, kv_lora_rank=512, qk_rope_head_dim=64)
    model = tiny_model(replace(MODEL, attention=attention))
    cache = new_cache(model, 2, 7)
    tensors = {name: value for name, value in vars(cache).items() if isinstance(value, Tensor)}
    assert list(tensors) == ["entries"]
    assert cache.entries.shape == (MODEL.num_layers, 2, 7, 576)
    assert cache.entries.untyped_storage().nbytes() == MODEL.num_layers * 2 * 7 * 576 * 4
    storage = cache.entries.data_ptr()
    with inference(model):
        for new in ([[1, 2, 3], [4]], [[5], [6]]):
            next_logits(model, new, cache)
    assert cache.entries.data_ptr() == storage
    assert cache.lengths == [4, 2]
    assert cache.entries[:, 0, :4].all()
    assert not cache.entries[:, 0, 4:].any()


def test_the_cache_holds_the_latent_after_its_norm_and_the_key_after_its_rotation(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, ids = tiny_model(CONFIGS["v3"]), tokens(1, 6)
    left: list[Tensor] = []

    def expand(self: LatentAttention, latent: Tensor, k_rope: Tensor) -> tuple[Tensor, Tensor]:
        left.append(torch.cat([latent, k_rope], dim=-1))
        return original(self, latent, k_rope)

    original = LatentAttention.expand_kv
    cache = new_cache(model, 1, 6)
    with inference(model):
        next_logits(model, ids[:, :4].tolist(), cache)
        next_logits(model, ids[:, 4:].tolist(), cache)
        monkeypatch.setattr(LatentAttention, "expand_kv", expand)
        model(ids)
    torch.testing.assert_close(cache.entries, torch.stack(left), rtol=0, atol=1e-5)


def test_decoding_expands_no_key_or_value(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    cache = new_cache(model, 1, 5)
    with inference(model):
        next_logits(model, [[1, 2, 3]], cache)
        monkeypatch.delattr(LatentAttention, "expand_kv")
        for module in model.modules():
            if isinstance(module, LatentAttention):
                monkeypatch.setattr(module, "kernel", None)
                # Its own matmul is an expansion; its weight may be used.
                monkeypatch.setattr(module.kv_b_proj, "matmul", None)
        next_logits(model, [[4, 5]], cache)


def test_the_softmax_over_latents_is_computed_in_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(dtype=torch.bfloat16)
    cache = new_cache(model, 1, 4, torch.bfloat16)
    seen: list[torch.dtype] = []

    def softmax(x: Tensor, dim: int) -> Tensor:
        seen.append(x.dtype)
        return torch.softmax(x, dim)

    with inference(model):
        next_logits(model, [[1, 2, 3]], cache)
        monkeypatch.setattr(Tensor, "softmax", softmax)
        found = next_logits(model, [[4]], cache)
    assert seen == [torch.float32] * MODEL.num_layers
    assert cache.entries.dtype == torch.bfloat16
    difference = found - whole(tiny_model(), torch.tensor([[1, 2, 3, 4]]))[:, -1]
    assert difference.abs().max() < 0.1


def test_only_the_last_token_of_each_row_gets_logits() -> None:
    model = tiny_model().eval()
    step = new_cache(model, 2, 4).extend([3, 1])
    output = model(torch.tensor([[1, 2, 3], [4, 0, 0]]), cache=step)
    assert output.logits.shape == (2, 1, MODEL.vocab_size)
    assert output.mtp_logits == []


@pytest.mark.parametrize(("counts", "message"), [([4, 5], "room for 4 tokens"), ([2, 0], "at least one")])
def test_a_row_without_tokens_or_without_room_is_refused(counts: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        new_cache(tiny_model(), 2, 4).extend(counts)


def test_room_counts_what_is_already_there() -> None:
    cache = new_cache(tiny_model(), 2, 4)
    cache.extend([3, 1])
    cache.extend([1, 1])
    with pytest.raises(ValueError, match="not 5"):
        cache.extend([1, 1])
