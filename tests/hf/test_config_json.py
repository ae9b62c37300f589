"""config.json to our numbers: the released keys, old and new forms, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest

from dsv3.config.model import RopeScaling
from dsv3.config.strict import to_yaml
from dsv3.errors import UserError
from dsv3.hf.config_json import model_from_hf, read_hf_model
from dsv3.hf.neutral_keys import NEUTRAL_KEYS
from tests.config.test_released_presets import V3, YARN

FP8 = V3["quantization_config"]
BOOKKEEPING = {"attention_dropout", "auto_map", "bos_token_id", "eos_token_id", "ep_size", "torch_dtype"}
BOOKKEEPING |= {"transformers_version", "use_cache"}
RELEASED_V3 = {key: value for key, value in V3.items() if key not in BOOKKEEPING}
"""What the release says of the model itself."""

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


def read(directory: Path, **changes: Any) -> dict[str, Any]:
    values = {key: value for key, value in {**RELEASED_V3, **changes}.items() if value is not ...}
    (directory / "config.json").write_text(json.dumps(values))
    return to_yaml(model_from_hf(directory))


def assert_refused(directory: Path, changes: dict[str, Any], words: list[str]) -> None:
    """Assert that V3's config.json with changes is refused in one line with these words and its name."""
    with pytest.raises(UserError) as error:
        read(directory, **changes)
    assert all(word in str(error.value) for word in [*words, "config.json"]), error.value
    assert len(str(error.value).splitlines()) == 1


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
        ({"model_type": "llama", "architectures": ...}, ["model_type='llama'", "deepseek_v3"]),
        ({"kv_lora_rank": ...}, ["no 'kv_lora_rank'"]),
        ({"hidden_size": "7168"}, ["hidden_size='7168'", "int"]),
        ({"vocab_size": True}, ["vocab_size=True", "int"]),
        ({"hidden_act": "gelu"}, ["hidden_act='gelu'", "silu"]),
        ({"tie_word_embeddings": True}, ["tie_word_embeddings=True", "False"]),
        ({"moe_layer_freq": 2}, ["moe_layer_freq=2"]),
        ({"num_local_experts": 8}, ["num_local_experts=8", "n_routed_experts=256"]),
        ({"num_mtp_layers": 2}, ["num_mtp_layers=2", "num_nextn_predict_layers=1"]),
        ({"original_max_position_embeddings": 8192}, ["original_max_position_embeddings=8192", "4096"]),
        ({"n_routed_experts": None}, ["num_nextn_predict_layers=1", "without experts"]),
        ({"topk_method": "topk"}, ["topk_method='topk'", "noaux_tc"]),
        ({"topk_method": "greedy"}, ["topk_method='greedy'", "noaux_tc"]),
        ({**V2, "topk_method": "noaux_tc"}, ["topk_method='noaux_tc'", "greedy, group_limited_greedy"]),
        ({"scoring_func": "softmax"}, ["scoring_func='softmax'", "sigmoid"]),
        ({**V2, "scoring_func": "sigmoid"}, ["scoring_func='sigmoid'", "softmax"]),
        ({**V2, "norm_topk_prob": True}, ["routed_scaling_factor=16.0", "norm_topk_prob=true"]),
        ({"architectures": ["LlamaForCausalLM"]}, ["LlamaForCausalLM", "DeepseekV3ForCausalLM"]),
        (
            {"architectures": V2["architectures"]},
            ["DeepseekV2ForCausalLM", "contradicts model_type='deepseek_v3'", "make model_type deepseek_v2"],
        ),
        (
            {"model_type": "deepseek_v2"},
            ["DeepseekV3ForCausalLM", "contradicts model_type='deepseek_v2'", "deepseek_v3 or kimi_k2"],
        ),
        ({"mlp_bias": True}, ["mlp_bias=True", "False"]),
        ({"mlp_layer_types": ["sparse"] * 61}, ["mlp_layer_types=", "first_k_dense_replace=3"]),
        ({"quantization_config": {**FP8, "fmt": "e5m2"}}, ["e5m2", "e4m3"]),
        ({"q_lora_rank": ...}, ["no 'q_lora_rank'", "deepseek_v3"]),
        ({"n_shared_experts": ...}, ["no 'n_shared_experts'"]),
        ({"routed_scaling_factor": ...}, ["no 'routed_scaling_factor'"]),
        ({"routed_scaling_factor": 10**400}, ["config.json", "a number of 401 digits"]),
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
        (
            {"quantization_config": {"quant_method": "awq"}},
            ["'awq'", "4-bit integers", "take the"],
        ),
        ({"quantization_config": {"quant_method": "compressed-tensors"}}, ["INT4 for one", "fp8 with two"]),
        ({"quantization_config": {"quant_method": "modelopt"}}, ["NVFP4 for one", "block-fp8"]),
        ({"quantization": {"bits": 4, "group_size": 64}}, ["'quantization' with bits=4", "take the"]),
        ({"quantization_config": {"quant_method": "fp8", "weight_block_size": [64]}}, ["[64]", "two block"]),
        ({"quantization_config": {"quant_method": "fp8", "weight_block_size": [64, 0]}}, ["[64, 0]"]),
    ],
)
def test_what_is_missing_or_not_supported_is_named(
    tmp_path: Path, changes: dict[str, Any], words: list[str]
) -> None:
    assert_refused(tmp_path, changes, words)


OTHER_ARCHITECTURES = [
    ({"model_type": "deepseek_v32"}, ["model_type='deepseek_v32'", "DeepSeek-V3.2", "indexer", "V3.1"]),
    ({"architectures": ["DeepseekV32ForCausalLM"]}, ["DeepSeek-V3.2", "indexer", "DeepSeek-V3.1"]),
    ({"architectures": ["GlmMoeDsaForCausalLM"]}, ["GLM-5", "indexer"]),
    ({"architectures": ["DeepseekV4ForCausalLM"]}, ["DeepSeek-V4", "compressed attention"]),
    ({"architectures": ["KimiLinearForCausalLM"]}, ["Kimi Linear", "linear attention", "Moonlight"]),
    ({"architectures": ["YoutuForCausalLM"], "model_type": "deepseek_v2"}, ["Youtu", "ties"]),
    ({"architectures": ["DeepseekV3ForCausalLM", "LlamaForCausalLM"]}, ["LlamaForCausalLM"]),
    ({"architectures": "DeepseekV3ForCausalLM"}, ["architectures='DeepseekV3ForCausalLM'"]),
    ({"text_config": {"hidden_size": 7168}}, ["'text_config'", "text model alone"]),
    ({"language_config": {"hidden_size": 7168}}, ["'language_config'", "text model alone"]),
    ({"index_topk": 2048}, ["index_topk=2048", "sparse attention", "remove the key"]),
    ({"swiglu_limit": 10.0}, ["swiglu_limit=10.0", "SwiGLU"]),
    ({"final_logit_softcapping": 30.0}, ["final_logit_softcapping=30.0", "soft caps"]),
    ({"attn_logit_softcapping": 50.0}, ["attn_logit_softcapping=50.0", "soft caps"]),
    ({"sliding_window": 4096}, ["sliding_window=4096", "windows"]),
    ({"layer_types": ["sliding_attention"] * 61}, ["layer_types=", "layers of other kinds"]),
    ({"linear_attn_config": {"head_dim": 128}}, ["linear_attn_config=", "linear attention"]),
    ({"embedding_multiplier": 12.0}, ["embedding_multiplier=12.0", "factors on activations"]),
    ({"use_qk_norm": True}, ["use_qk_norm=True", "norms of queries and keys"]),
    ({"partial_rotary_factor": 0.5}, ["partial_rotary_factor=0.5", "without rotation"]),
    ({"hc_mult": 4}, ["hc_mult=4", "DeepSeek-V4"]),
    ({"clip_qkv": 8.0}, ["clip_qkv=8.0", "another attention"]),
    ({"mlp_only_layers": [3]}, ["mlp_only_layers=[3]", "choice of layers"]),
    ({"rope_scaling": {**YARN, "partial_rotary_factor": 0.5}}, ["rope_scaling.partial_rotary_factor=0.5"]),
]


@pytest.mark.parametrize(("changes", "words"), OTHER_ARCHITECTURES)
def test_other_architectures_are_refused_by_name(
    tmp_path: Path, changes: dict[str, Any], words: list[str]
) -> None:
    assert_refused(tmp_path, changes, words)


@pytest.mark.parametrize(
    "changes",
    [
        {"num_key_value_heads": 8},
        {"num_key_value_heads": ...},
        {"model_type": "Create-Bot-V2_k2"},
        {"model_type": ...},
        {"architectures": ...},
        {"architectures": None, "model_type": "kimi_k2"},
        {"num_local_experts": 256, "num_mtp_layers": 1},
        {"n_routed_experts": ..., "num_experts": 256},
        {"mlp_layer_types": ["dense"] * 3 + ["sparse"] * 58},
        {"original_max_position_embeddings": 4096, "partial_rotary_factor": 1.0},
        {"sliding_window": 4096, "use_sliding_window": False},
        {"sliding_window": None, "swiglu_limit": 0.0, "layer_types": ["full_attention"] * 61},
        {"rope_scaling": {**YARN, "max_position_embeddings": 163840, "low_freq_factor": 1.0}},
        dict.fromkeys(NEUTRAL_KEYS, 3.5),
        {key: {"a": [True]} for key in NEUTRAL_KEYS},
    ],
)
def test_what_changes_no_number_is_allowed(tmp_path: Path, changes: dict[str, Any]) -> None:
    assert read(tmp_path, **changes) == read(tmp_path)
    assert read_hf_model(tmp_path)[1] == []


def test_keys_that_no_code_reads_are_named(tmp_path: Path) -> None:
    assert read(tmp_path, house_key=3, unsloth_version="2026", left_null=None) == read(tmp_path)
    read(tmp_path, house_key=3, unsloth_version="2026", left_null=None)
    assert read_hf_model(tmp_path)[1] == ["house_key", "unsloth_version"]


def test_more_dense_layers_than_layers_are_all_of_them(tmp_path: Path) -> None:
    found = read(tmp_path, num_hidden_layers=2, first_k_dense_replace=3, num_nextn_predict_layers=0)
    assert (found["num_layers"], found["num_dense_layers"]) == (2, 2)
    found = read(tmp_path, n_routed_experts=None, num_nextn_predict_layers=0)
    assert (found["num_layers"], found["num_dense_layers"]) == (61, 61)


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
