"""Numbers of a model in the config.json that it came with: each is written, and nothing else changes."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dsv3.config.convergence import flatten
from dsv3.config.model import ModelConfig, RopeScaling, ScoreFunction
from dsv3.config.strict import to_yaml
from dsv3.errors import UserError
from dsv3.hf.config_json import model_from_hf
from dsv3.hf.config_writer import config_json, updated_config
from tests.config.test_released_presets import YARN
from tests.hf.pairs import SMALL
from tests.hf.test_config_json import RELEASED_V3, V2

V2_ROUTING = {
    "moe.score_function": ScoreFunction.softmax,
    "moe.selection_bias": False,
    "moe.normalize_top_k": False,
}

CHANGES: dict[str, dict[str, Any]] = {
    "vocab_size": {"vocab_size": 96},
    "dim": {"dim": 64},
    "num_layers": {"num_layers": 4},
    "num_dense_layers": {"num_dense_layers": 2},
    "dense_hidden_dim": {"dense_hidden_dim": 80},
    "attention.heads": {"attention.heads": 8},
    "attention.q_lora_rank": {"attention.q_lora_rank": None},
    "attention.kv_lora_rank": {"attention.kv_lora_rank": 48},
    "attention.qk_nope_head_dim": {"attention.qk_nope_head_dim": 24},
    "attention.qk_rope_head_dim": {"attention.qk_rope_head_dim": 16},
    "attention.v_head_dim": {"attention.v_head_dim": 40},
    "moe.num_experts": {"moe.num_experts": 320},
    "moe.top_k": {"moe.top_k": 5},
    "moe.num_shared_experts": {"moe.num_shared_experts": 0},
    "moe.hidden_dim": {"moe.hidden_dim": 72},
    "moe.num_groups": {"moe.num_groups": 4, "moe.top_k_groups": 2},
    "moe.top_k_groups": {"moe.top_k_groups": 2},
    "moe.route_scale": {"moe.route_scale": 3.5},
    "moe.score_function": V2_ROUTING,
    "moe.selection_bias": V2_ROUTING,
    "moe.normalize_top_k": {"moe.normalize_top_k": False},
    "rope.theta": {"rope.theta": 70000.0},
    "rope.scaling": {"rope.scaling": RopeScaling.none},
    "rope.factor": {"rope.factor": 8.0},
    "rope.original_sequence_length": {"rope.original_sequence_length": 1024},
    "rope.beta_fast": {"rope.beta_fast": 16.0},
    "rope.beta_slow": {"rope.beta_slow": 2.0},
    "rope.mscale": {"rope.mscale": 0.5},
    "rope.mscale_all_dim": {"rope.mscale_all_dim": 0.25},
    "mtp_depths": {"mtp_depths": 0},
    "norm_eps": {"norm_eps": 1e-5},
    "init_std": {"init_std": 0.01},
}
"""By key of the model, a change of it that leaves V3 a model that transformers computes."""

NOT_IN_FILES = {"attention.kernel", "moe.forced_balance", "latent_norm_eps"}
"""What no config.json says: an implementation, a benchmark, an epsilon that is a constant everywhere."""

ROPE_5 = {"rope_type": "yarn", "rope_theta": 10000.0, **{key: YARN[key] for key in YARN if key != "type"}}

FORMS: dict[str, dict[str, Any]] = {
    "as released": {"auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV3Config"}},
    "transformers 5": {
        "rope_scaling": ...,
        "rope_theta": ...,
        "rope_parameters": ROPE_5,
        "head_dim": 64,
        "qk_head_dim": 192,
        "mlp_layer_types": ["dense"] * 3 + ["sparse"] * 58,
    },
    "both": {"rope_parameters": ROPE_5},
}


def changed(model: ModelConfig, changes: dict[str, Any]) -> ModelConfig:
    for key, value in changes.items():
        node, _, name = key.rpartition(".")
        inner = replace(getattr(model, node), **{name: value}) if node else value
        model = replace(model, **{node or name: inner})
    return model


def stored(directory: Path, values: dict[str, Any]) -> ModelConfig:
    (directory / "config.json").write_text(json.dumps(values))
    return model_from_hf(directory)


def test_every_number_of_the_model_has_a_change_here(tmp_path: Path) -> None:
    keys = set(flatten(to_yaml(stored(tmp_path, RELEASED_V3))))
    assert {key for key in keys if not key.startswith("_")} == CHANGES.keys() | NOT_IN_FILES


@pytest.mark.parametrize("form", FORMS)
def test_a_number_that_differs_from_the_file_is_written_and_no_other(tmp_path: Path, form: str) -> None:
    merged = {**RELEASED_V3, **FORMS[form], "bos_token_id": 0, "eos_token_id": 1}
    values = {key: value for key, value in merged.items() if value is not ...}
    came = stored(tmp_path, values)
    assert updated_config(values, came, came) == values
    for key, change in CHANGES.items():
        model = changed(came, change)
        written = updated_config(values, model, came)
        found = stored(tmp_path, written)
        if model.rope.scaling is RopeScaling.none:  # then the other numbers of YaRN say nothing
            model = replace(model, rope=replace(found.rope, theta=model.rope.theta))
        assert found == model, key
        for kept in ("bos_token_id", "eos_token_id", "quantization_config"):
            assert written[kept] == values[kept]
        assert ("rope_parameters" in written) == ("rope_parameters" in values)
        assert "auto_map" not in written or model.moe.score_function is ScoreFunction.sigmoid
        about = {name for name in written if written[name] != values.get(name)}
        assert len(about) <= (7 if len(change) > 1 else 3), (key, about)


@pytest.mark.parametrize("kind", ["deepseek_v3", "deepseek_v2"])
def test_transformers_reads_an_updated_file_as_one_that_is_new(tmp_path: Path, kind: str) -> None:
    transformers = pytest.importorskip("transformers")
    name = {"deepseek_v3": "DeepseekV3Config", "deepseek_v2": "DeepseekV2Config"}[kind]
    v3 = {"n_group": 4, "topk_group": 2, "norm_topk_prob": kind == "deepseek_v3"}
    yarn = {**ROPE_5, "original_max_position_embeddings": 64, "factor": 4.0}
    config = getattr(transformers, name)(**{**SMALL, **v3, "rope_parameters": yarn})
    config.save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    if kind == "deepseek_v2":
        values |= {"topk_method": "group_limited_greedy"}
    came = stored(tmp_path, values | {"architectures": None})
    ours = {"architectures", "model_type", "torch_dtype", "topk_method", "scoring_func"}
    ours |= {"rope_theta", "rope_scaling", "moe_layer_freq", "use_cache"}
    numbers = set(config_json(came, "float32")) - ours | {"rope_parameters", "head_dim", "qk_head_dim"}
    for key, change in CHANGES.items():
        small = {"moe.num_experts": 24, "num_layers": 2}.get(key)
        model = changed(came, {key: small} if small else change)
        if set(V2_ROUTING) & set(change) and kind == "deepseek_v2":
            continue
        updated, new = updated_config(values, model, came), config_json(model, "float32")
        one, other = (getattr(transformers, name).from_dict(each).to_dict() for each in (updated, new))
        for values_read in (one, other):
            values_read["rope_parameters"].pop("type", None)  # the older name of rope_type
        assert {key: one.get(key) for key in numbers} == {key: other.get(key) for key in numbers}, key


def test_no_mtp_layer_is_said_because_transformers_would_expect_one(tmp_path: Path) -> None:
    without = {key: value for key, value in RELEASED_V3.items() if key != "num_nextn_predict_layers"}
    came = stored(tmp_path, without)
    assert came.mtp_depths == 0
    assert updated_config(without, came, came)["num_nextn_predict_layers"] == 0
    assert config_json(came, "bfloat16")["num_nextn_predict_layers"] == 0
    one = changed(stored(tmp_path, RELEASED_V3), {"mtp_depths": 0})
    assert updated_config(RELEASED_V3, one, came)["num_nextn_predict_layers"] == 0


def test_a_model_that_no_class_computes_is_refused_unless_it_came_so(tmp_path: Path) -> None:
    values = {**RELEASED_V3, **V2, "norm_topk_prob": True, "routed_scaling_factor": 1.0}
    values = {key: value for key, value in values.items() if value is not ...}
    came = stored(tmp_path, values)
    assert updated_config(values, changed(came, {"moe.top_k": 4}), came)["num_experts_per_tok"] == 4
    with pytest.raises(UserError, match="latent_norm_eps=1e-05 cannot be written"):
        updated_config(values, changed(came, {"latent_norm_eps": 1e-5, "moe.normalize_top_k": False}), came)
