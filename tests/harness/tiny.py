"""The tiny model: every mechanism of the debug model, a step of it in a blink, and a size for every layout.

Four heads, eight experts and a hidden size of 32 split over up to eight ranks along any dim. The brute-force
model of tests/reference.py and the releases of tests/convert/releases.py have sizes of their own: those of
the reference are all different, and those of the releases are no multiples of a scale's block.
"""

import functools

from dsv3.config.model import ModelConfig
from dsv3.config.strict import strict
from tests.harness.composing import compose

VOCAB = 300
"""More than the 256 bytes, so that a byte-level tokenizer fits."""
MODEL = [
    f"model.vocab_size={VOCAB}",
    "model.dim=32",
    "model.num_layers=2",
    "model.dense_hidden_dim=48",
    "model.attention.heads=4",
    "model.attention.q_lora_rank=16",
    "model.attention.kv_lora_rank=16",
    "model.attention.qk_nope_head_dim=8",
    "model.attention.qk_rope_head_dim=8",
    "model.attention.v_head_dim=8",
    "model.moe.num_experts=8",
    "model.moe.hidden_dim=16",
    "model.moe.top_k=2",
]
TRAINING = [
    f"tokenizer.vocab_size={VOCAB}",
    "data.held_out=0.1",
    "train.sequence_length=32",
    "train.global_batch_size=4",
    "logger=none",
]
"""Settings for training the tiny model on a short text; steps and intervals are up to the test."""


@functools.cache
def model_config(*overrides: str) -> ModelConfig:
    """Return the tiny model's config under `overrides`. Composing takes half a second, so keep the result."""
    model: ModelConfig = strict(compose([*MODEL, *overrides])).model
    return model
