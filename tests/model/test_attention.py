"""MLA against loops over heads and positions with an explicit softmax."""

from dataclasses import replace

import pytest
import torch

from dsv3.config.model import ModelConfig
from dsv3.model.attention import LatentAttention
from dsv3.model.attention_kernels import document_segments
from dsv3.model.rope import rotary_table, softmax_scale
from tests import reference
from tests.reference import ATTENTION, MODEL, YARN, assert_close, assert_same_gradients, normal

CONFIGS = {
    "with a query latent": MODEL,
    "with direct queries": replace(MODEL, attention=replace(ATTENTION, q_lora_rank=None)),
    "with yarn": replace(MODEL, rope=YARN),
    "with values wider than keys": replace(MODEL, attention=replace(ATTENTION, v_head_dim=20)),
}


def build(config: ModelConfig) -> LatentAttention:
    scale = softmax_scale(config.rope, config.attention.qk_head_dim)
    module = LatentAttention(config.dim, config.attention, scale, config.latent_norm_eps)
    reference.randomize(module)
    return module


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", CONFIGS)
def test_attention_equals_a_loop_over_heads_and_positions(name: str, packed: bool) -> None:
    config = CONFIGS[name]
    module, x = build(config), normal(2, 7, 32)
    rotary = rotary_table(config.rope, 4, torch.arange(7))
    documents = torch.tensor([[0, 0, 0, 1, 1, 1, 1], [0, 1, 1, 1, 2, -1, -1]]) if packed else None
    found = module(x, rotary, document_segments(documents))
    expected = reference.attention(module, x, config, documents)
    assert_close(found, expected)
    assert_same_gradients(found, expected, [x, *module.parameters()], 3e-5)


def test_what_a_token_leaves_behind_is_one_latent_and_one_rotated_key() -> None:
    module = build(MODEL)
    _, latent, k_rope = module.compress(normal(2, 5, 32))
    assert (latent.shape, k_rope.shape) == ((2, 5, 16), (2, 5, 4))
    k, v = module.expand_kv(latent, k_rope)
    assert (k.shape, v.shape) == ((2, 5, 2, 12), (2, 5, 2, 6))
    assert torch.equal(k[:, :, 0, 8:], k_rope)
    assert torch.equal(k[:, :, 1, 8:], k_rope)
