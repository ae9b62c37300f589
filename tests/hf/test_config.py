"""config.json to our numbers: the released keys, old and new forms, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest

from dsv3.checkpoint.hf_config import model_from_hf
from dsv3.config import plain
from dsv3.model.config import RopeScaling
from dsv3.runtime.errors import UserError
from tests.composing import compose

YARN = {
    "type": "yarn",
    "factor": 40,
    "original_max_position_embeddings": 4096,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}
RELEASED_V3: dict[str, Any] = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "attention_bias": False,
    "first_k_dense_replace": 3,
    "hidden_act": "silu",
    "hidden_size": 7168,
    "initializer_range": 0.02,
    "intermediate_size": 18432,
    "kv_lora_rank": 512,
    "max_position_embeddings": 163840,
    "moe_intermediate_size": 2048,
    "moe_layer_freq": 1,
    "n_group": 8,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 61,
    "num_key_value_heads": 128,
    "num_nextn_predict_layers": 1,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "rms_norm_eps": 1e-6,
    "rope_scaling": YARN,
    "rope_theta": 10000,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "tie_word_embeddings": False,
    "topk_group": 4,
    "topk_method": "noaux_tc",
    "v_head_dim": 128,
    "vocab_size": 129280,
}


def read(directory: Path, **changes: Any) -> dict[str, Any]:
    values = {key: value for key, value in {**RELEASED_V3, **changes}.items() if value is not ...}
    (directory / "config.json").write_text(json.dumps(values))
    return plain(model_from_hf(directory))


def test_the_released_v3_config_is_the_671b_preset(tmp_path: Path) -> None:
    preset = plain(compose(["model=671b"]).model)
    found = read(tmp_path)
    # The checkpoint says what HF initialises with; the preset, what the report trained with.
    assert (found.pop("init_std"), preset.pop("init_std")) == (0.02, 0.006)
    assert found == preset


def test_the_new_form_of_rope_parameters_means_the_same(tmp_path: Path) -> None:
    new = {"rope_type": "yarn", "rope_theta": 10000.0, **{k: v for k, v in YARN.items() if k != "type"}}
    assert read(tmp_path, rope_scaling=..., rope_theta=..., rope_parameters=new) == read(tmp_path)


def test_without_scaling_the_length_is_the_models_own(tmp_path: Path) -> None:
    rope = read(tmp_path, rope_scaling=None, max_position_embeddings=8192, rope_theta=50000.0)["rope"]
    assert rope["scaling"] == RopeScaling.none.name
    assert (rope["theta"], rope["original_sequence_length"]) == (50000.0, 8192)


def test_routing_follows_topk_method(tmp_path: Path) -> None:
    v2 = {"model_type": "deepseek_v2", "scoring_func": "softmax", "norm_topk_prob": False}
    limited = read(tmp_path, **v2, topk_method="group_limited_greedy")["moe"]
    assert (limited["num_groups"], limited["top_k_groups"], limited["selection_bias"]) == (8, 4, False)
    greedy = read(tmp_path, **v2, topk_method="greedy")["moe"]
    assert (greedy["num_groups"], greedy["top_k_groups"]) == (1, 1)
    assert read(tmp_path)["moe"]["selection_bias"]


def test_latent_norms_keep_their_own_eps(tmp_path: Path) -> None:
    found = read(tmp_path, rms_norm_eps=1e-5)
    assert (found["norm_eps"], found["latent_norm_eps"]) == (1e-5, 1e-6)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "llama"}, ["model_type='llama'", "deepseek_v3"]),
        ({"kv_lora_rank": ...}, ["no 'kv_lora_rank'"]),
        ({"hidden_size": "7168"}, ["hidden_size='7168'", "int"]),
        ({"vocab_size": True}, ["vocab_size=True", "int"]),
        ({"hidden_act": "gelu"}, ["hidden_act='gelu'", "silu"]),
        ({"tie_word_embeddings": True}, ["tie_word_embeddings=True", "False"]),
        ({"moe_layer_freq": 2}, ["moe_layer_freq=2"]),
        ({"num_key_value_heads": 8}, ["num_key_value_heads=8", "128"]),
        ({"topk_method": "topk"}, ["topk_method='topk'", "noaux_tc"]),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, ["'linear'", "yarn"]),
        ({"rope_scaling": {"type": "yarn"}}, ["'factor'"]),
        ({"quantization_config": {"quant_method": "awq"}}, ["'awq'", "fp8 with [128, 128]"]),
        ({"quantization_config": {"quant_method": "fp8", "weight_block_size": [64, 64]}}, ["[64, 64]"]),
    ],
)
def test_what_is_missing_or_not_supported_is_named(
    tmp_path: Path, changes: dict[str, Any], words: list[str]
) -> None:
    with pytest.raises(UserError) as error:
        read(tmp_path, **changes)
    assert all(word in str(error.value) for word in [*words, "config.json"])


@pytest.mark.parametrize("text", ["", "[1]", "{"])
def test_a_file_that_is_no_config_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match=r"config\.json"):
        model_from_hf(tmp_path)
    with pytest.raises(UserError, match="holds no config"):
        model_from_hf(tmp_path / "elsewhere")
