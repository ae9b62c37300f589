"""A model's numbers from the config.json of a HuggingFace checkpoint."""

from pathlib import Path

from dsv3.checkpoint.released.rope import rope_from_hf
from dsv3.checkpoint.released.values import HFValues, read_config
from dsv3.config import validate
from dsv3.model.config import AttentionConfig, ModelConfig, MoEConfig, ScoreFunction
from dsv3.runtime.errors import InvalidValue, UserError

ARCHITECTURES = {
    "deepseek_v3": "DeepseekV3ForCausalLM",
    "kimi_k2": "DeepseekV3ForCausalLM",
    "deepseek_v2": "DeepseekV2ForCausalLM",
}
"""The class whose weights each `model_type` has."""
BLOCK = 128
"""Rows and columns that share a scale in DeepSeek's releases."""
METHODS = {"deepseek_v2": ("greedy", "group_limited_greedy")}
"""`topk_method` of V2: without groups, or with groups scored by their maximum; V3 has `noaux_tc` alone."""

_HF_KEYS = {
    "dim": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_dense_layers": "first_k_dense_replace",
    "dense_hidden_dim": "intermediate_size",
    "norm_eps": "rms_norm_eps",
    "init_std": "initializer_range",
    "mtp_depths": "num_nextn_predict_layers",
    "attention.heads": "num_attention_heads",
    "moe.num_experts": "n_routed_experts",
    "moe.top_k": "num_experts_per_tok",
    "moe.num_shared_experts": "n_shared_experts",
    "moe.hidden_dim": "moe_intermediate_size",
    "moe.num_groups": "n_group",
    "moe.top_k_groups": "topk_group",
    "moe.route_scale": "routed_scaling_factor",
    "rope.theta": "rope_theta",
    "rope.original_sequence_length": "original_max_position_embeddings",
}
"""What HF calls our numbers, where its name is another one."""


def model_from_hf(directory: Path) -> ModelConfig:
    """The model of a checkpoint directory.

    UserError for a key that is missing, or a value of the wrong type, out of range or not supported.
    """
    hf = read_config(directory)
    _check_architecture(hf)
    block_size(hf)
    model = ModelConfig(
        vocab_size=hf.get("vocab_size", int),
        dim=hf.get("hidden_size", int),
        num_layers=hf.get("num_hidden_layers", int),
        num_dense_layers=hf.get("first_k_dense_replace", int),
        dense_hidden_dim=hf.get("intermediate_size", int),
        attention=_attention(hf),
        moe=_moe(hf),
        rope=rope_from_hf(hf),
        mtp_depths=hf.get("num_nextn_predict_layers", int, None) or 0,
        norm_eps=hf.get("rms_norm_eps", float),
        init_std=hf.get("initializer_range", float, 0.02),
    )
    _check_layer_types(hf, model)
    try:
        validate(model)
    except InvalidValue as wrong:
        key = _HF_KEYS.get(wrong.key, wrong.key.rpartition(".")[2])
        raise UserError(f"{hf.file}: {key}={wrong.value} is not possible: {wrong.allowed}") from None
    return model


def _check_architecture(hf: HFValues) -> None:
    kind = hf.require("model_type", tuple(ARCHITECTURES), None)
    hf.require("architectures", (None, [ARCHITECTURES[kind]]), None)
    hf.require("hidden_act", ("silu",), "silu")
    hf.require("tie_word_embeddings", (False,), False)
    hf.require("attention_bias", (False,), False)
    hf.require("mlp_bias", (False,), False)
    hf.require("moe_layer_freq", (1,), 1)
    hf.require("rope_interleave", (True,), True)


def _check_layer_types(hf: HFValues, model: ModelConfig) -> None:
    """HF's newer way to say which layers have experts must mean what first_k_dense_replace does."""
    dense = min(max(model.num_dense_layers, 0), model.num_layers)
    types = hf.values.get("mlp_layer_types")
    if types not in (None, ["dense"] * dense + ["sparse"] * (model.num_layers - dense)):
        text = f"is not what first_k_dense_replace={dense} of {model.num_layers} layers says"
        raise hf.error("mlp_layer_types", types, text)


def block_size(hf: HFValues) -> tuple[int, int]:
    """Rows and columns of a block-fp8 weight that share a scale; without quantisation [128, 128].

    UserError for a format other than DeepSeek's.
    """
    stored = hf.node("quantization_config")
    if stored is None:
        return BLOCK, BLOCK
    method, block, form = map(stored.values.get, ("quant_method", "weight_block_size", "fmt"))
    sides = block if isinstance(block, list) and all(type(side) is int and side > 0 for side in block) else []
    if method != "fp8" or len(sides) != 2 or form not in (None, "e4m3"):
        raise UserError(
            f"{hf.file}: quantization_config with quant_method={method!r}, weight_block_size={block}, "
            f"fmt={form!r} is not supported; supported: none, or fp8 with two block sides and e4m3"
        )
    return sides[0], sides[1]


def _attention(hf: HFValues) -> AttentionConfig:
    heads = hf.get("num_attention_heads", int)
    hf.require("num_key_value_heads", (heads, None), None)
    return AttentionConfig(
        heads=heads,
        q_lora_rank=hf.get("q_lora_rank", int, nullable=True),
        kv_lora_rank=hf.get("kv_lora_rank", int),
        qk_nope_head_dim=hf.get("qk_nope_head_dim", int),
        qk_rope_head_dim=hf.get("qk_rope_head_dim", int),
        v_head_dim=hf.get("v_head_dim", int),
    )


def _moe(hf: HFValues) -> MoEConfig:
    kind = hf.values["model_type"]
    methods = METHODS.get(kind, ("noaux_tc",))
    method = hf.require("topk_method", methods, methods[0])
    # The released code of V2 knows softmax alone and that of V3 sigmoid; HF does not even look.
    score = "softmax" if kind == "deepseek_v2" else "sigmoid"
    hf.require("scoring_func", (score,), score)
    grouped = method != "greedy"
    return MoEConfig(
        num_experts=hf.get("n_routed_experts", int),
        top_k=hf.get("num_experts_per_tok", int),
        num_shared_experts=hf.get("n_shared_experts", int, nullable=True) or 0,
        hidden_dim=hf.get("moe_intermediate_size", int),
        score_function=ScoreFunction[score],
        num_groups=hf.get("n_group", int) if grouped else 1,
        top_k_groups=hf.get("topk_group", int) if grouped else 1,
        route_scale=hf.get("routed_scaling_factor", float),
        normalize_top_k=_normalizes(hf),
        selection_bias=method == "noaux_tc",
    )


def _normalizes(hf: HFValues) -> bool:
    """`norm_topk_prob`: V2's released code renormalises or scales, never both; HF's never renormalises."""
    normalizes: bool = hf.get("norm_topk_prob", bool)
    scale = hf.get("routed_scaling_factor", float)
    if normalizes and hf.values["model_type"] == "deepseek_v2" and scale != 1:
        text = f"is not supported with norm_topk_prob=true: deepseek_v2 then leaves the factor {scale} out"
        raise hf.error("routed_scaling_factor", scale, text)
    return normalizes
