"""config.json to our numbers: the released keys, old and new forms, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest

from dsv3.config.model import RopeScaling
from dsv3.config.strict import to_yaml
from dsv3.errors import UserError
from dsv3.hf.config_json import model_from_hf
from tests.harness.composing import compose

YARN = {
    "type": "yarn",
    "factor": 40,
    "original_max_position_embeddings": 4096,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}
FP8 = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128]}
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
    "quantization_config": FP8,
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

V2: dict[str, Any] = {
    "architectures": ["DeepseekV2ForCausalLM"],
    "model_type": "deepseek_v2",
    "first_k_dense_replace": 1,
    "hidden_size": 5120,
    "intermediate_size": 12288,
    "max_position_embeddings": 163840,
    "moe_intermediate_size": 1536,
    "n_routed_experts": 160,
    "n_shared_experts": 2,
    "norm_topk_prob": False,
    "num_experts_per_tok": 6,
    "num_hidden_layers": 60,
    "num_nextn_predict_layers": ...,
    "routed_scaling_factor": 16.0,
    "scoring_func": "softmax",
    "topk_group": 3,
    "topk_method": "group_limited_greedy",
    "vocab_size": 102400,
}
RELEASED: dict[str, dict[str, Any]] = {
    "236b": V2,
    "16b": {
        **V2,
        "hidden_size": 2048,
        "intermediate_size": 10944,
        "moe_intermediate_size": 1408,
        "n_group": 1,
        "n_routed_experts": 64,
        "num_attention_heads": 16,
        "num_hidden_layers": 27,
        "num_key_value_heads": 16,
        "q_lora_rank": None,
        "rope_scaling": {**YARN, "mscale": 0.707, "mscale_all_dim": 0.707},
        "routed_scaling_factor": 1.0,
        "topk_group": 1,
        "topk_method": "greedy",
    },
    "moonlight_16b": {
        "first_k_dense_replace": 1,
        "hidden_size": 2048,
        "intermediate_size": 11264,
        "max_position_embeddings": 8192,
        "moe_intermediate_size": 1408,
        "n_group": 1,
        "n_routed_experts": 64,
        "n_shared_experts": 2,
        "num_attention_heads": 16,
        "num_experts_per_tok": 6,
        "num_hidden_layers": 27,
        "num_key_value_heads": 16,
        "num_nextn_predict_layers": 0,
        "q_lora_rank": None,
        "rms_norm_eps": 1e-5,
        "rope_scaling": ...,
        "rope_theta": 50000.0,
        "routed_scaling_factor": 2.446,
        "topk_group": 1,
        "vocab_size": 163840,
    },
    "kimi_k2": {
        "model_type": "kimi_k2",
        "first_k_dense_replace": 1,
        "max_position_embeddings": 131072,
        "n_group": 1,
        "n_routed_experts": 384,
        "num_attention_heads": 64,
        "num_key_value_heads": 64,
        "num_nextn_predict_layers": 0,
        "quantization_config": FP8,
        "rope_scaling": {**YARN, "factor": 32.0, "beta_fast": 1.0, "beta_slow": 1.0},
        "rope_theta": 50000.0,
        "routed_scaling_factor": 2.827,
        "topk_group": 1,
        "vocab_size": 163840,
    },
}
"""Values of other released config.json files in place of V3's, by the preset that equals them."""


def read(directory: Path, **changes: Any) -> dict[str, Any]:
    values = {key: value for key, value in {**RELEASED_V3, **changes}.items() if value is not ...}
    (directory / "config.json").write_text(json.dumps(values))
    return to_yaml(model_from_hf(directory))


@pytest.mark.parametrize("preset", ["671b", *RELEASED])
def test_a_released_config_is_the_preset_of_its_name(tmp_path: Path, preset: str) -> None:
    found = read(tmp_path, **RELEASED.get(preset, {}))
    expected = to_yaml(compose([f"model={preset}"]).model)
    # The checkpoint says what HF initialises with; the preset, what the model was trained with.
    assert found.pop("init_std") == 0.02
    del expected["init_std"]
    assert found == expected


def test_the_new_form_of_rope_parameters_means_the_same(tmp_path: Path) -> None:
    new = {"rope_type": "yarn", "rope_theta": 10000.0, **{k: v for k, v in YARN.items() if k != "type"}}
    assert read(tmp_path, rope_scaling=..., rope_theta=..., rope_parameters=new) == read(tmp_path)


def test_without_scaling_the_length_is_the_models_own(tmp_path: Path) -> None:
    rope = read(tmp_path, rope_scaling=None, max_position_embeddings=8192, rope_theta=50000.0)["rope"]
    assert rope["scaling"] == RopeScaling.none.name
    assert (rope["theta"], rope["original_sequence_length"]) == (50000.0, 8192)


def test_routing_follows_topk_method(tmp_path: Path) -> None:
    limited = read(tmp_path, **V2)["moe"]
    assert (limited["num_groups"], limited["top_k_groups"], limited["selection_bias"]) == (8, 3, False)
    greedy = read(tmp_path, **{**V2, "topk_method": "greedy"})["moe"]
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
        ({"topk_method": "greedy"}, ["topk_method='greedy'", "noaux_tc"]),
        ({**V2, "topk_method": "noaux_tc"}, ["topk_method='noaux_tc'", "greedy, group_limited_greedy"]),
        ({"scoring_func": "softmax"}, ["scoring_func='softmax'", "sigmoid"]),
        ({**V2, "scoring_func": "sigmoid"}, ["scoring_func='sigmoid'", "softmax"]),
        ({**V2, "norm_topk_prob": True}, ["routed_scaling_factor=16.0", "norm_topk_prob=true"]),
        ({"architectures": ["LlamaForCausalLM"]}, ["LlamaForCausalLM", "DeepseekV3ForCausalLM"]),
        ({"architectures": V2["architectures"]}, ["DeepseekV2ForCausalLM", "DeepseekV3ForCausalLM"]),
        ({"mlp_bias": True}, ["mlp_bias=True", "False"]),
        ({"mlp_layer_types": ["sparse"] * 61}, ["mlp_layer_types=", "first_k_dense_replace=3"]),
        ({"quantization_config": {**FP8, "fmt": "e5m2"}}, ["e5m2", "e4m3"]),
        ({"q_lora_rank": ...}, ["no 'q_lora_rank'", "deepseek_v3"]),
        ({"n_shared_experts": ...}, ["no 'n_shared_experts'"]),
        ({"routed_scaling_factor": ...}, ["no 'routed_scaling_factor'"]),
        ({"routed_scaling_factor": 10**400}, ["routed_scaling_factor=", "finite"]),
        ({"max_position_embeddings": ...}, ["no 'max_position_embeddings'"]),
        ({"norm_topk_prob": ...}, ["no 'norm_topk_prob'"]),
        ({"topk_group": ...}, ["no 'topk_group'"]),
        ({"rope_theta": ...}, ["no 'rope_theta'", "rope_parameters"]),
        ({"rope_theta": "abc"}, ["rope_theta='abc'", "float"]),
        ({"rope_theta": 5e4, "rope_scaling": {**YARN, "rope_theta": 1e4}}, ["rope_theta=50000.0", "10000.0"]),
        ({"rope_parameters": {"rope_type": "default"}}, ["rope_scaling=", "rope_parameters"]),
        ({"rope_scaling": "yarn"}, ["rope_scaling='yarn'", "object"]),
        ({"rope_scaling": [YARN]}, ["rope_scaling=[", "object"]),
        ({"rope_scaling": {"factor": 40}}, ["no 'rope_scaling.rope_type'"]),
        ({"rope_scaling": {**YARN, "rope_type": "default"}}, ["rope_scaling.rope_type='default'", "'yarn'"]),
        ({"rope_scaling": {**YARN, "attention_factor": 1.2}}, ["rope_scaling.attention_factor=1.2"]),
        ({"rope_scaling": {**YARN, "truncate": False}}, ["rope_scaling.truncate=False"]),
        ({"rope_scaling": {**YARN, "partial": 1}}, ["rope_scaling.partial=1", "known keys"]),
        ({"rope_scaling": {**YARN, "factor": "x"}}, ["rope_scaling.factor='x'", "float"]),
        ({"rope_scaling": {**YARN, "factor": None}}, ["rope_scaling.factor=None", "float"]),
        ({"rope_scaling": {**YARN, "mscale": None}}, ["rope_scaling.mscale=None", "float"]),
        (
            {"rope_scaling": {"type": "yarn", "factor": 40}},
            ["'rope_scaling.original_max_position"],
        ),
        # What our own check of the model finds goes by the file's names.
        ({"num_experts_per_tok": 0}, ["num_experts_per_tok=0", "above 0"]),
        ({"hidden_size": 7169}, ["hidden_size=7169", "multiple of 8"]),
        ({"rope_scaling": {**YARN, "factor": 0.5}}, ["factor=0.5", "at least 1"]),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, ["'linear'", "yarn"]),
        ({"rope_scaling": {"type": "yarn"}}, ["no 'rope_scaling.factor'"]),
        ({"quantization_config": {"quant_method": "awq"}}, ["'awq'", "fp8 with two block sides"]),
        ({"quantization_config": {"quant_method": "fp8", "weight_block_size": [64]}}, ["[64]", "two block"]),
        ({"quantization_config": {"quant_method": "fp8", "weight_block_size": [64, 0]}}, ["[64, 0]"]),
    ],
)
def test_what_is_missing_or_not_supported_is_named(
    tmp_path: Path, changes: dict[str, Any], words: list[str]
) -> None:
    with pytest.raises(UserError) as error:
        read(tmp_path, **changes)
    assert all(word in str(error.value) for word in [*words, "config.json"]), error.value
    assert len(str(error.value).splitlines()) == 1


def test_yarn_keys_that_change_nothing_are_allowed(tmp_path: Path) -> None:
    neutral = {**YARN, "rope_type": "yarn", "attention_factor": None, "truncate": True, "rope_theta": 10000}
    assert read(tmp_path, rope_scaling=neutral) == read(tmp_path)


def test_v2_weights_may_be_renormalised_where_no_factor_is_left_out(tmp_path: Path) -> None:
    moe = read(tmp_path, **{**V2, "norm_topk_prob": True, "routed_scaling_factor": 1.0})["moe"]
    assert (moe["normalize_top_k"], moe["route_scale"]) == (True, 1.0)


@pytest.mark.parametrize("text", ["", "[1]", "{", "[" * 100_000, '{"a":' * 100_000])
def test_a_file_that_is_no_config_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match=r"config\.json"):
        model_from_hf(tmp_path)
    with pytest.raises(UserError, match="holds no config"):
        model_from_hf(tmp_path / "elsewhere")
