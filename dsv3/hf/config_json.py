"""Read a model's config from the config.json of an HF checkpoint, and write the config.json of a model.

Rotary settings are in `rope_parameters` (transformers 5), or in `rope_theta` and `rope_scaling` (older).
"""

from pathlib import Path
from typing import Any

from dsv3.config.model import (
    AttentionConfig,
    ModelConfig,
    MoEConfig,
    RopeConfig,
    RopeScaling,
    ScoreFunction,
)
from dsv3.config.strict import validate
from dsv3.errors import InvalidValue, UserError
from dsv3.hf.config_values import HFValues, read_config
from dsv3.planning.sharding import FP8_BLOCK

_ROPE_KEYS = {
    "rope_theta",
    "rope_type",
    "type",
    "factor",
    "original_max_position_embeddings",
    "beta_fast",
    "beta_slow",
    "mscale",
    "mscale_all_dim",
}

# Keys of transformers' YaRN that DeepSeek's code does not have, with the values that change nothing.
_NEUTRAL = {"attention_factor": (None,), "truncate": (True,)}


def rope_from_hf(hf: HFValues) -> RopeConfig:
    """Return the rotary embedding.

    UserError for a key that is missing, unknown or given twice with two values.
    """
    length = hf.get("max_position_embeddings", int)
    nodes = [node for key in ("rope_parameters", "rope_scaling") if (node := hf.node(key)) is not None]
    found = [_rope_from_node(hf, node, length) for node in nodes]
    if len(found) == 2 and found[0] != found[1]:
        raise hf.error("rope_scaling", nodes[1].values, "is not what rope_parameters says")
    return found[0] if found else RopeConfig(theta=_rope_theta(hf, None), original_sequence_length=length)


def _rope_from_node(hf: HFValues, node: HFValues, length: int) -> RopeConfig:
    """Return what one of the two objects says; `length` is the model's max_position_embeddings."""
    theta, kind = _rope_theta(hf, node), _rope_type(node)
    for key, value in node.values.items():
        if key not in _ROPE_KEYS and value not in _NEUTRAL.get(key, ()):
            raise node.error(key, value, f"is not supported; known keys: {', '.join(sorted(_ROPE_KEYS))}")
    if kind == "default":
        return RopeConfig(theta=theta, original_sequence_length=length)
    return RopeConfig(
        theta=theta,
        scaling=RopeScaling.yarn,
        factor=node.get("factor", float),
        original_sequence_length=node.get("original_max_position_embeddings", int),
        beta_fast=node.get("beta_fast", float, 32.0),
        beta_slow=node.get("beta_slow", float, 1.0),
        # The defaults of DeepSeek's code, which those of transformers come to as well.
        mscale=node.get("mscale", float, 1.0),
        mscale_all_dim=node.get("mscale_all_dim", float, 0.0),
    )


def _rope_theta(hf: HFValues, node: HFValues | None) -> float:
    """Return `rope_theta`, which stands beside the scaling or in it; the two must agree."""
    outside: float | None = hf.get("rope_theta", float, None)
    inside: float | None = None if node is None else node.get("rope_theta", float, None)
    if node is not None and None not in (outside, inside) and outside != inside:
        raise hf.error("rope_theta", outside, f"but {node.inside}rope_theta={inside}: which one is right?")
    theta = outside if inside is None else inside
    if theta is None:
        raise hf.missing("rope_theta", "nor does rope_parameters: every rotary model needs it")
    return theta


def _rope_type(node: HFValues) -> str:
    """Return `default` or `yarn`, from `rope_type` or the older `type`, which must agree."""
    kinds = {
        key: node.require(key, ("default", "yarn"), None)
        for key in ("rope_type", "type")
        if node.values.get(key) is not None
    }
    if len(set(kinds.values())) > 1:
        raise node.error("rope_type", kinds["rope_type"], f"but {node.inside}type={kinds['type']!r}")
    if not kinds and set(node.values) - {"rope_theta"}:
        raise node.missing("rope_type", "which says how it scales")
    return next(iter(kinds.values()), "default")


ARCHITECTURES = {
    "deepseek_v3": "DeepseekV3ForCausalLM",
    "kimi_k2": "DeepseekV3ForCausalLM",
    "deepseek_v2": "DeepseekV2ForCausalLM",
}
"""transformers' model class by `model_type`."""

_TOPK_METHODS = {"deepseek_v2": ("greedy", "group_limited_greedy")}
"""`topk_method` of V2: no groups, or groups scored by their maximum. V3 has `noaux_tc` alone."""

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
"""Our config keys -> keys of config.json, where the two differ."""


def model_from_hf(directory: Path) -> ModelConfig:
    """Return the model of a checkpoint directory.

    UserError for a key that is missing, or a value of the wrong type, out of range or not supported.
    """
    hf = read_config(directory)
    kind = hf.require("model_type", tuple(ARCHITECTURES), None)
    hf.require("architectures", (None, [ARCHITECTURES[kind]]), None)
    hf.require("hidden_act", ("silu",), "silu")
    hf.require("tie_word_embeddings", (False,), False)
    hf.require("attention_bias", (False,), False)
    hf.require("mlp_bias", (False,), False)
    hf.require("moe_layer_freq", (1,), 1)
    hf.require("rope_interleave", (True,), True)
    block_size(hf)  # refuses a quantization that is not supported
    heads = hf.get("num_attention_heads", int)
    hf.require("num_key_value_heads", (heads, None), None)
    model = ModelConfig(
        vocab_size=hf.get("vocab_size", int),
        dim=hf.get("hidden_size", int),
        num_layers=hf.get("num_hidden_layers", int),
        num_dense_layers=hf.get("first_k_dense_replace", int),
        dense_hidden_dim=hf.get("intermediate_size", int),
        attention=AttentionConfig(
            heads=heads,
            q_lora_rank=hf.get("q_lora_rank", int, nullable=True),
            kv_lora_rank=hf.get("kv_lora_rank", int),
            qk_nope_head_dim=hf.get("qk_nope_head_dim", int),
            qk_rope_head_dim=hf.get("qk_rope_head_dim", int),
            v_head_dim=hf.get("v_head_dim", int),
        ),
        moe=_moe_from_hf(hf),
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


def _check_layer_types(hf: HFValues, model: ModelConfig) -> None:
    """Raise UserError unless `mlp_layer_types`, the newer key, says the same as first_k_dense_replace."""
    dense = min(max(model.num_dense_layers, 0), model.num_layers)
    types = hf.values.get("mlp_layer_types")
    if types not in (None, ["dense"] * dense + ["sparse"] * (model.num_layers - dense)):
        text = f"is not what first_k_dense_replace={dense} of {model.num_layers} layers says"
        raise hf.error("mlp_layer_types", types, text)


def block_size(hf: HFValues) -> tuple[int, int]:
    """Return the rows and columns of a block-fp8 weight that share a scale; without quantization (128, 128).

    UserError for a format other than DeepSeek's.
    """
    stored = hf.node("quantization_config")
    if stored is None:
        return FP8_BLOCK, FP8_BLOCK
    method, block, form = map(stored.values.get, ("quant_method", "weight_block_size", "fmt"))
    sides = block if isinstance(block, list) and all(type(side) is int and side > 0 for side in block) else []
    if method != "fp8" or len(sides) != 2 or form not in (None, "e4m3"):
        raise UserError(
            f"{hf.file}: quantization_config with quant_method={method!r}, weight_block_size={block}, "
            f"fmt={form!r} is not supported; supported: none, or fp8 with two block sides and e4m3"
        )
    return sides[0], sides[1]


def _moe_from_hf(hf: HFValues) -> MoEConfig:
    """Return routing and experts; UserError for a combination that DeepSeek's code does not have."""
    kind = hf.values["model_type"]
    methods = _TOPK_METHODS.get(kind, ("noaux_tc",))
    method = hf.require("topk_method", methods, methods[0])
    # DeepSeek's code knows softmax alone in V2 and sigmoid in V3; transformers ignores the key.
    score = "softmax" if kind == "deepseek_v2" else "sigmoid"
    hf.require("scoring_func", (score,), score)
    grouped = method != "greedy"
    scale = hf.get("routed_scaling_factor", float)
    # V2's code renormalizes or scales, never both; that of transformers never renormalizes.
    normalizes = hf.get("norm_topk_prob", bool)
    if normalizes and kind == "deepseek_v2" and scale != 1:
        text = f"is not supported with norm_topk_prob=true: deepseek_v2 then leaves the factor {scale} out"
        raise hf.error("routed_scaling_factor", scale, text)
    return MoEConfig(
        num_experts=hf.get("n_routed_experts", int),
        top_k=hf.get("num_experts_per_tok", int),
        num_shared_experts=hf.get("n_shared_experts", int, nullable=True) or 0,
        hidden_dim=hf.get("moe_intermediate_size", int),
        score_function=ScoreFunction[score],
        num_groups=hf.get("n_group", int) if grouped else 1,
        top_k_groups=hf.get("topk_group", int) if grouped else 1,
        route_scale=scale,
        normalize_top_k=normalizes,
        selection_bias=method == "noaux_tc",
    )


def config_json(model: ModelConfig, dtype: str) -> dict[str, Any]:
    """Return the config.json of a model with weights of `dtype` (PyTorch's name); softmax routing is V2.

    UserError for a model that neither class of transformers computes.
    """
    kind = "deepseek_v2" if model.moe.score_function is ScoreFunction.softmax else "deepseek_v3"
    _require_known_class(model, kind)
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
    return values | _moe_to_hf(moe, kind) | _rope_to_hf(model.rope)


def updated_config(values: dict[str, Any], model: ModelConfig, came: ModelConfig) -> dict[str, Any]:
    """Return the config.json that `came` was read from, with the numbers of `model` where the two differ.

    UserError for a model that neither class of transformers computes.
    """
    if model == came:
        return dict(values)
    wanted, known = config_json(model, ""), config_json(came, "")
    stale = set(known) - set(wanted)
    if (model.num_layers, model.num_dense_layers) != (came.num_layers, came.num_dense_layers):
        stale.add("mlp_layer_types")
    changed = {key: value for key, value in wanted.items() if value != known.get(key)}
    if model.rope != came.rope:
        # rope_parameters says the same in newer files, which would then contradict the rest.
        stale.add("rope_parameters")
        changed |= _rope_to_hf(model.rope)
    return {key: value for key, value in values.items() if key not in stale} | changed


def _moe_to_hf(moe: MoEConfig, kind: str) -> dict[str, Any]:
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


def _rope_to_hf(rope: RopeConfig) -> dict[str, Any]:
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


def _require_known_class(model: ModelConfig, kind: str) -> None:
    """Raise UserError for a model that DeepSeek's code of V3 and V2 does not compute."""
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
