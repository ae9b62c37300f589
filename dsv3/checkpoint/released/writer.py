"""The config.json of a model trained here: what hf_config.py reads, written."""

from typing import Any

from dsv3.checkpoint.released.config import ARCHITECTURES
from dsv3.model.config import ModelConfig, MoEConfig, RopeConfig, RopeScaling, ScoreFunction
from dsv3.runtime.errors import UserError


def config_json(model: ModelConfig, dtype: str) -> dict[str, Any]:
    """The config.json of a model with weights of `dtype` (its PyTorch name): softmax routing makes it V2.

    UserError for a model that no released class computes.
    """
    kind = "deepseek_v2" if model.moe.score_function is ScoreFunction.softmax else "deepseek_v3"
    _check(model, kind)
    attention, moe = model.attention, model.moe
    values = {
        "architectures": [ARCHITECTURES[kind]],
        "model_type": kind,
        "torch_dtype": dtype,
        "vocab_size": model.vocab_size,
        "hidden_size": model.dim,
        "intermediate_size": model.dense_hidden_dim,
        "num_hidden_layers": model.num_layers,
        "first_k_dense_replace": model.num_dense_layers,
        "num_attention_heads": attention.heads,
        "num_key_value_heads": attention.heads,
        "q_lora_rank": attention.q_lora_rank,
        "kv_lora_rank": attention.kv_lora_rank,
        "qk_nope_head_dim": attention.qk_nope_head_dim,
        "qk_rope_head_dim": attention.qk_rope_head_dim,
        "v_head_dim": attention.v_head_dim,
        "rms_norm_eps": model.norm_eps,
        "initializer_range": model.init_std,
        "hidden_act": "silu",
        "attention_bias": False,
        "tie_word_embeddings": False,
        "use_cache": True,
    }
    if model.mtp_depths:
        values["num_nextn_predict_layers"] = model.mtp_depths
    return values | _moe(moe, kind) | _rope(model.rope)


def _moe(moe: MoEConfig, kind: str) -> dict[str, Any]:
    grouped = moe.num_groups > 1
    method = "noaux_tc" if kind == "deepseek_v3" else "group_limited_greedy" if grouped else "greedy"
    return {
        "n_routed_experts": moe.num_experts,
        "num_experts_per_tok": moe.top_k,
        "n_shared_experts": moe.num_shared_experts or None,
        "moe_intermediate_size": moe.hidden_dim,
        "moe_layer_freq": 1,
        "n_group": moe.num_groups,
        "topk_group": moe.top_k_groups,
        "topk_method": method,
        "scoring_func": moe.score_function.name,
        "routed_scaling_factor": moe.route_scale,
        "norm_topk_prob": moe.normalize_top_k,
    }


def _rope(rope: RopeConfig) -> dict[str, Any]:
    if rope.scaling is RopeScaling.none:
        length = rope.original_sequence_length
        return {"rope_theta": rope.theta, "max_position_embeddings": length, "rope_scaling": None}
    scaling = {
        "type": "yarn",
        "factor": rope.factor,
        "original_max_position_embeddings": rope.original_sequence_length,
        "beta_fast": rope.beta_fast,
        "beta_slow": rope.beta_slow,
        "mscale": rope.mscale,
        "mscale_all_dim": rope.mscale_all_dim,
    }
    length = int(rope.original_sequence_length * rope.factor)
    return {"rope_theta": rope.theta, "max_position_embeddings": length, "rope_scaling": scaling}


def _check(model: ModelConfig, kind: str) -> None:
    """UserError for what the released code of V3 and V2 does not compute."""
    moe = model.moe
    wrong = None
    if (kind == "deepseek_v3") is not moe.selection_bias:
        wrong = f"model.moe.selection_bias={str(moe.selection_bias).lower()}"
    elif kind == "deepseek_v2" and moe.normalize_top_k:
        wrong = "model.moe.normalize_top_k=true"
    elif model.latent_norm_eps != 1e-6:
        wrong = f"model.latent_norm_eps={model.latent_norm_eps}"
    if wrong:
        raise UserError(f"{wrong} cannot be written to a config.json: no {ARCHITECTURES[kind]} computes that")
