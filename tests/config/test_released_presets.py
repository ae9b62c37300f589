"""Every number of a preset against the config.json of its release, by revision and digest of that file."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from dsv3.config.model import ModelConfig
from dsv3.config.registry import ROOT, config_groups
from dsv3.config.strict import strict
from dsv3.hf.config_json import model_from_hf
from dsv3.hf.config_writer import config_json
from tests.harness.composing import compose

YARN = {
    "beta_fast": 32,
    "beta_slow": 1,
    "factor": 40,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "original_max_position_embeddings": 4096,
    "type": "yarn",
}
V3: dict[str, Any] = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "auto_map": {
        "AutoConfig": "configuration_deepseek.DeepseekV3Config",
        "AutoModel": "modeling_deepseek.DeepseekV3Model",
        "AutoModelForCausalLM": "modeling_deepseek.DeepseekV3ForCausalLM",
    },
    "bos_token_id": 0,
    "eos_token_id": 1,
    "ep_size": 1,
    "first_k_dense_replace": 3,
    "hidden_act": "silu",
    "hidden_size": 7168,
    "initializer_range": 0.02,
    "intermediate_size": 18432,
    "kv_lora_rank": 512,
    "max_position_embeddings": 163840,
    "model_type": "deepseek_v3",
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
    "quantization_config": {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": [128, 128],
    },
    "rms_norm_eps": 1e-06,
    "rope_scaling": YARN,
    "rope_theta": 10000,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "tie_word_embeddings": False,
    "topk_group": 4,
    "topk_method": "noaux_tc",
    "torch_dtype": "bfloat16",
    "transformers_version": "4.33.1",
    "use_cache": True,
    "v_head_dim": 128,
    "vocab_size": 129280,
}
V2_5: dict[str, Any] = {
    **V3,
    "architectures": ["DeepseekV2ForCausalLM"],
    "auto_map": {
        "AutoConfig": "configuration_deepseek.DeepseekV2Config",
        "AutoModel": "modeling_deepseek.DeepseekV2Model",
        "AutoModelForCausalLM": "modeling_deepseek.DeepseekV2ForCausalLM",
    },
    "aux_loss_alpha": 0.001,
    "bos_token_id": 100000,
    "eos_token_id": 100001,
    "first_k_dense_replace": 1,
    "hidden_size": 5120,
    "intermediate_size": 12288,
    "model_type": "deepseek_v2",
    "moe_intermediate_size": 1536,
    "n_routed_experts": 160,
    "n_shared_experts": 2,
    "norm_topk_prob": False,
    "num_experts_per_tok": 6,
    "num_hidden_layers": 60,
    "num_nextn_predict_layers": ...,
    "pretraining_tp": 1,
    "quantization_config": ...,
    "routed_scaling_factor": 16.0,
    "scoring_func": "softmax",
    "seq_aux": True,
    "topk_group": 3,
    "topk_method": "group_limited_greedy",
    "transformers_version": "4.39.3",
    "vocab_size": 102400,
}
V2 = {**V2_5, "rope_scaling": {**YARN, "mscale": 0.707, "mscale_all_dim": 0.707}}
K2: dict[str, Any] = {
    **V3,
    "aux_loss_alpha": 0.001,
    "bos_token_id": 163584,
    "eos_token_id": 163585,
    "ep_size": ...,
    "first_k_dense_replace": 1,
    "max_position_embeddings": 131072,
    "model_type": "kimi_k2",
    "n_group": 1,
    "n_routed_experts": 384,
    "num_attention_heads": 64,
    "num_key_value_heads": 64,
    "num_nextn_predict_layers": 0,
    "pretraining_tp": 1,
    "rope_scaling": {**YARN, "beta_fast": 1.0, "beta_slow": 1.0, "factor": 32.0},
    "rope_theta": 50000.0,
    "routed_scaling_factor": 2.827,
    "seq_aux": True,
    "topk_group": 1,
    "transformers_version": "4.48.3",
    "vocab_size": 163840,
}


class Release(NamedTuple):
    """A config.json on the hub, and the command that gives its model."""

    command: str
    repository: str
    revision: str
    digest: str | None
    """SHA-256 of the file; None where no copy with its bytes was at hand."""
    values: dict[str, Any]
    """All of the file; `...` stands for no such key."""


RELEASES = [
    Release(
        "model=16b",
        "deepseek-ai/DeepSeek-V2-Lite",
        "604d5664dddd88a0433dbae533b7fe9472482de0",
        "f346286b0f1c8b044252fd54cb4fa78b9fab6472a6e8bebb9edfe03d414ea03d",
        {
            **V2,
            "ep_size": ...,
            "hidden_size": 2048,
            "intermediate_size": 10944,
            "moe_intermediate_size": 1408,
            "n_group": 1,
            "n_routed_experts": 64,
            "num_attention_heads": 16,
            "num_hidden_layers": 27,
            "num_key_value_heads": 16,
            "q_lora_rank": None,
            "routed_scaling_factor": 1.0,
            "topk_group": 1,
            "topk_method": "greedy",
            "transformers_version": "4.33.1",
        },
    ),
    Release("model=236b", "deepseek-ai/DeepSeek-V2", "4461458f186c35188585855f28f77af5661ad489", None, V2),
    Release(
        "model=236b model.rope.mscale=1 model.rope.mscale_all_dim=1",
        "deepseek-ai/DeepSeek-V2.5",
        "c85b5ede86f2a598af339624cac5723861e557ed",
        "4cb37d1e07da958c0367cc9697cec37ae0a80ee9a7c922c37232d798fb311e3e",
        V2_5,
    ),
    Release(
        "model=671b",
        "deepseek-ai/DeepSeek-V3",
        "e815299b0bcbac849fa540c768ef21845365c9eb",
        "cbf0b95dc614de208a109bb5fd4e7eed11385e9c68411d2c17db5319443035d9",
        V3,
    ),
    Release(
        "model=671b",
        "deepseek-ai/DeepSeek-V3.1",
        "c0781d039fb7a1ba2abc4add0bdc293e92d2b8db",
        "3e5d192d745758862b0a3e6338ee181991db49933dbbd3185e1bde34944e7bad",
        {
            **V3,
            "quantization_config": {**V3["quantization_config"], "scale_fmt": "ue8m0"},
            "transformers_version": "4.44.2",
        },
    ),
    Release(
        "model=moonlight_16b",
        "moonshotai/Moonlight-16B-A3B-Instruct",
        "4e735b07a89f73647dfab71ab91b840f362ede5b",
        "6827d4b5327a446d6a80716a6e5cec695f279b282110ef7dae09241656430302",
        {
            **K2,
            "ep_size": 1,
            "eos_token_id": 163586,
            "hidden_size": 2048,
            "intermediate_size": 11264,
            "max_position_embeddings": 8192,
            "model_type": "deepseek_v3",
            "moe_intermediate_size": 1408,
            "n_routed_experts": 64,
            "n_shared_experts": 2,
            "num_attention_heads": 16,
            "num_experts_per_tok": 6,
            "num_hidden_layers": 27,
            "num_key_value_heads": 16,
            "q_lora_rank": None,
            "quantization_config": ...,
            "rms_norm_eps": 1e-05,
            "rope_scaling": ...,
            "routed_scaling_factor": 2.446,
            "transformers_version": "4.46.3",
        },
    ),
    Release(
        "model=kimi_k2",
        "moonshotai/Kimi-K2-Instruct",
        "fd1984e2b7a3350dbf7305fe73a4ede25c14de50",
        "8c13ae1049df55f29b3bdcae69a562433f243ff70dac251d819ecad8dbdf7439",
        K2,
    ),
    Release(
        "model=kimi_k2 model.rope.factor=64",
        "moonshotai/Kimi-K2-Instruct-0905",
        "7152993552508c9f22042b3bb93b5e6acd06ce73",
        None,
        {**K2, "max_position_embeddings": 262144, "rope_scaling": {**K2["rope_scaling"], "factor": 64.0}},
    ),
]

REPORTED = {
    "16b": (0.006, "arXiv 2405.04434, section 3.1.2, of V2; appendix B, of V2-Lite, names no other"),
    "236b": (0.006, "arXiv 2405.04434, section 3.1.2"),
    "671b": (0.006, "arXiv 2412.19437, section 4.2"),
}
"""init_std where a report says it: config.json has 0.02 everywhere, the default of its class."""


def released_text(release: Release) -> str:
    """Return the config.json of a release, as its bytes are."""
    by_hand = "Kimi" in release.repository  # sorted but for one key, and without a last newline
    late = {"rope_scaling": "routed_scaling_factor."} if by_hand else {}
    keys = sorted(release.values, key=lambda key: late.get(key, key))
    values = {key: release.values[key] for key in keys if release.values[key] is not ...}
    return json.dumps(values, indent=2) + ("" if by_hand else "\n")


def preset(release: Release) -> tuple[str, ModelConfig]:
    """Return the name and the model of a release's command."""
    overrides = release.command.split()
    model: ModelConfig = strict(compose(overrides)).model
    return overrides[0].removeprefix("model="), model


NAMED = {release.repository.partition("/")[2]: release for release in RELEASES}


@pytest.mark.parametrize("release", NAMED.values(), ids=NAMED)
def test_a_preset_has_every_number_of_its_release(release: Release, tmp_path: Path) -> None:
    text = released_text(release)
    if release.digest is not None:
        assert hashlib.sha256(text.encode()).hexdigest() == release.digest, "the table is not the file"
    (tmp_path / "config.json").write_text(text)
    released = model_from_hf(tmp_path)
    name, model = preset(release)
    assert model == replace(released, init_std=REPORTED.get(name, (released.init_std, ""))[0])
    # The other way round, with what follows from several numbers: max_position_embeddings.
    written = config_json(replace(model, init_std=released.init_std), "bfloat16")
    assert written["max_position_embeddings"] == release.values["max_position_embeddings"]
    named = {"model_type"}  # kimi_k2, whose class is that of deepseek_v3
    values = {key: value for key, value in json.loads(text).items() if key in written.keys() - named}
    assert values == {key: written[key] for key in values}
    assert len(values) > 30


def test_every_preset_of_a_released_model_has_its_release() -> None:
    of_releases = {release.command.split()[0].removeprefix("model=") for release in RELEASES}
    assert of_releases == set(config_groups()["model"]) - {"debug", "hf"}
    assert all(len(release.revision) == 40 for release in RELEASES)
    documented = (ROOT / "docs" / "configuration.md").read_text()
    assert all(f"| `{release.command}` |" in documented for release in RELEASES)
