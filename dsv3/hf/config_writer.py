"""Write the config.json of a model: a new one, or the one that its weights came with, brought up to date.

Whatever the model of an export is, its config.json says the model's own numbers. Keys that are no numbers of
the model (special tokens, code of the release, settings of other programs) stay as they came.
"""

from collections.abc import Mapping
from typing import Any

from dsv3.config.model import ModelConfig, MoEConfig, RopeConfig, RopeScaling, ScoreFunction
from dsv3.errors import UserError
from dsv3.hf.other_architectures import ARCHITECTURES


def config_json(model: ModelConfig, dtype: str) -> dict[str, Any]:
    """Return the config.json of a model with weights of `dtype` (PyTorch's name); softmax routing is V2.

    UserError for a model that neither class of transformers computes.
    """
    if wrong := _not_computed(model):
        raise UserError(wrong)
    return {
        "architectures": [ARCHITECTURES[_model_type(model)]],
        "model_type": _model_type(model),
        "torch_dtype": dtype,
        "hidden_act": "silu",
        "attention_bias": False,
        "tie_word_embeddings": False,
        "use_cache": True,
        "moe_layer_freq": 1,
    } | _numbers(model)


def updated_config(values: Mapping[str, Any], model: ModelConfig, came: ModelConfig) -> dict[str, Any]:
    """Return the config.json that `came` was read from, with the numbers of `model` where the two differ.

    UserError for a model that neither class of transformers computes, if `came` was none of that kind.
    """
    wrong = _not_computed(model)
    if wrong and wrong != _not_computed(came):
        raise UserError(wrong)
    wanted, known = _numbers(model), _numbers(came)
    updated = dict(values) | {key: value for key, value in wanted.items() if value != known[key]}
    if _model_type(model) != _model_type(came):
        kind = _model_type(model)
        updated |= {"model_type": kind, "architectures": [ARCHITECTURES[kind]]}
        updated.pop("auto_map", None)  # the release's code computes the other kind
    if model.rope != came.rope:
        _update_rope(updated, values, model.rope)
    for key, old, new in _repeated(came, model):
        if values.get(key) == old:
            updated[key] = new
    # transformers takes a missing key for one depth.
    if _model_type(model) == "deepseek_v3" or "num_nextn_predict_layers" in values:
        updated["num_nextn_predict_layers"] = model.mtp_depths
    return updated


def _model_type(model: ModelConfig) -> str:
    return "deepseek_v2" if model.moe.score_function is ScoreFunction.softmax else "deepseek_v3"


def _numbers(model: ModelConfig) -> dict[str, Any]:
    """Return every key of config.json that follows from the model's numbers."""
    attention = model.attention
    values = {
        "vocab_size": model.vocab_size,
        "hidden_size": model.dim,
        "intermediate_size": model.dense_hidden_dim,
        "num_hidden_layers": model.num_layers,
        "first_k_dense_replace": model.num_dense_layers,
        "num_nextn_predict_layers": model.mtp_depths,
        "num_attention_heads": attention.heads,
        "num_key_value_heads": attention.heads,
        "q_lora_rank": attention.q_lora_rank,
        "kv_lora_rank": attention.kv_lora_rank,
        "qk_nope_head_dim": attention.qk_nope_head_dim,
        "qk_rope_head_dim": attention.qk_rope_head_dim,
        "v_head_dim": attention.v_head_dim,
        "rms_norm_eps": model.norm_eps,
        "initializer_range": model.init_std,
    }
    rope = {
        "rope_theta": model.rope.theta,
        "max_position_embeddings": _longest(model.rope),
        "rope_scaling": _yarn(model.rope, ["type"]),
    }
    return values | _routing(model.moe, _model_type(model)) | rope


def _routing(moe: MoEConfig, kind: str) -> dict[str, Any]:
    grouped = moe.num_groups > 1
    method = "noaux_tc" if kind == "deepseek_v3" else "group_limited_greedy" if grouped else "greedy"
    return {
        "n_routed_experts": moe.num_experts,
        "num_experts_per_tok": moe.top_k,
        "n_shared_experts": moe.num_shared_experts,  # transformers 5 takes no null
        "moe_intermediate_size": moe.hidden_dim,
        "n_group": moe.num_groups,
        "topk_group": moe.top_k_groups,
        "topk_method": method,
        "scoring_func": moe.score_function.name,
        "routed_scaling_factor": moe.route_scale,
        "norm_topk_prob": moe.normalize_top_k,
    }


def _repeated(came: ModelConfig, model: ModelConfig) -> list[tuple[str, Any, Any]]:
    """Return the keys with which some files repeat other keys, with their old and their new value."""

    def values(config: ModelConfig) -> dict[str, Any]:
        dense = config.num_dense_layers
        return {
            "head_dim": config.attention.qk_rope_head_dim,
            "qk_head_dim": config.attention.qk_head_dim,
            "num_mtp_layers": config.mtp_depths,
            "mlp_layer_types": ["dense"] * dense + ["sparse"] * (config.num_layers - dense),
        }

    old, new = values(came), values(model)
    return [(key, old[key], new[key]) for key in old]


def _longest(rope: RopeConfig) -> int:
    """Return the tokens of the longest text: config.json's max_position_embeddings."""
    scaled = rope.scaling is RopeScaling.yarn
    return int(rope.original_sequence_length * rope.factor) if scaled else rope.original_sequence_length


def _yarn(rope: RopeConfig, kind_keys: list[str]) -> dict[str, Any] | None:
    """Return rope_scaling, None without scaling; `kind_keys` are the names of its kind."""
    if rope.scaling is RopeScaling.none:
        return None
    return dict.fromkeys(kind_keys, "yarn") | {
        "factor": rope.factor,
        "original_max_position_embeddings": rope.original_sequence_length,
        "beta_fast": rope.beta_fast,
        "beta_slow": rope.beta_slow,
        "mscale": rope.mscale,
        "mscale_all_dim": rope.mscale_all_dim,
    }


def _update_rope(updated: dict[str, Any], values: Mapping[str, Any], rope: RopeConfig) -> None:
    """Set the rotary keys of `updated` in the form, of transformers 5 or older, that `values` have."""
    if rope.scaling is RopeScaling.none:  # with scaling, a file may name another length than it comes to
        updated["max_position_embeddings"] = rope.original_sequence_length
    new, old = values.get("rope_parameters"), values.get("rope_scaling")
    if new is not None:
        node = _yarn(rope, ["rope_type"]) or {"rope_type": "default"}
        updated["rope_parameters"] = {"rope_theta": rope.theta} | node
    if new is not None and old is None:  # the old form would say it twice
        updated.pop("rope_scaling", None)
        updated.pop("rope_theta", None)
    else:
        names = [key for key in ("rope_type", "type") if key in (old or {})]
        updated["rope_scaling"] = _yarn(rope, names or ["type"])
        updated["rope_theta"] = rope.theta


def _not_computed(model: ModelConfig) -> str | None:
    """Return why DeepSeek's code of V3 and V2 does not compute a model, None where it does."""
    moe, kind = model.moe, _model_type(model)
    if (kind == "deepseek_v3") is not moe.selection_bias:
        wrong = f"model.moe.selection_bias={str(moe.selection_bias).lower()}"
    elif kind == "deepseek_v2" and moe.normalize_top_k:
        wrong = "model.moe.normalize_top_k=true"
    elif model.latent_norm_eps != 1e-6:
        wrong = f"model.latent_norm_eps={model.latent_norm_eps}"
    else:
        return None
    return f"{wrong} cannot be written to a config.json: no {ARCHITECTURES[kind]} computes that"
