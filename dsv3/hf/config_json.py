"""Read a model's config from the config.json of an HF checkpoint; config_writer.py writes one.

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
from dsv3.errors import InvalidValue, UserError, quoted
from dsv3.hf.config_values import HFValues, read_config
from dsv3.hf.neutral_keys import NEUTRAL_KEYS, NEUTRAL_ROPE_KEYS, NEUTRAL_ROPE_VALUES, ROPE_KEYS
from dsv3.hf.other_architectures import ARCHITECTURES, refuse_other_architecture
from dsv3.hf.quantization import block_size


def rope_from_hf(hf: HFValues) -> RopeConfig:
    """Return the rotary embedding.

    UserError for a key that is missing, unknown or given twice with two values.
    """
    length = hf.get("max_position_embeddings", int)
    original = hf.get("original_max_position_embeddings", int, None)
    nodes = [node for key in ("rope_parameters", "rope_scaling") if (node := hf.node(key)) is not None]
    found = [_rope_from_node(hf, node, length) for node in nodes]
    if len(found) == 2 and found[0] != found[1]:
        raise hf.error("rope_scaling", nodes[1].values, "is not what rope_parameters says")
    for rope in found:
        if rope.scaling is RopeScaling.yarn and original not in (None, rope.original_sequence_length):
            text = f"is not that of the scaling, {rope.original_sequence_length}: which one is right?"
            raise hf.error("original_max_position_embeddings", original, text)
    return found[0] if found else RopeConfig(theta=_rope_theta(hf, None), original_sequence_length=length)


def _rope_from_node(hf: HFValues, node: HFValues, length: int) -> RopeConfig:
    """Return what one of the two objects says; `length` is the model's max_position_embeddings."""
    theta, kind = _rope_theta(hf, node), _rope_type(node)
    for key, value in node.values.items():
        known = key in ROPE_KEYS or key in NEUTRAL_ROPE_KEYS or value in NEUTRAL_ROPE_VALUES.get(key, ())
        if not known:
            raise node.error(key, value, f"is not supported; known keys: {', '.join(sorted(ROPE_KEYS))}")
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


_TOPK_METHODS = {"deepseek_v2": ("greedy", "group_limited_greedy")}
"""`topk_method` of V2: no groups, or groups scored by their maximum. V3 has `noaux_tc` alone."""

_EXPERT_ALIASES = {"num_local_experts", "num_experts"}
"""Names under which transformers' classes also take n_routed_experts."""

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

_MOE_KEYS = {key for ours, key in _HF_KEYS.items() if ours.startswith("moe.")} | {
    *("norm_topk_prob", "scoring_func", "topk_method"),
}
"""Keys that only layers with experts read."""


def family(hf: HFValues) -> str:
    """Return `deepseek_v2` or `deepseek_v3`, whose code computes a config.json's model.

    The class in `architectures` decides. model_type may then be a name of the publisher's own, but not that
    of another class. UserError for any other architecture.
    """
    refuse_other_architecture(hf)
    kind, names = hf.values.get("model_type"), hf.values.get("architectures")
    hf.used |= {"model_type", "architectures"}
    if not names:
        name = ARCHITECTURES[hf.require("model_type", tuple(ARCHITECTURES), None)]
    else:
        classes = tuple([each] for each in dict.fromkeys(ARCHITECTURES.values()))
        (name,) = hf.require("architectures", classes, None)
        # A known model_type names its class; any other one leaves both open.
        own = ARCHITECTURES.get(kind, name) if isinstance(kind, str) else name
        if own != name:
            types = " or ".join(each for each, of in ARCHITECTURES.items() if of == name)
            fix = f"make model_type {types} if the class is right, or else architectures ['{own}']"
            raise hf.error("architectures", names, f"contradicts model_type={quoted(kind)} of {own}: {fix}")
    return next(kind for kind, each in ARCHITECTURES.items() if each == name)


def model_from_hf(directory: Path) -> ModelConfig:
    """Return the model of a checkpoint directory.

    UserError for a key that is missing, of another architecture, or with a value of the wrong type, out of
    range or not supported.
    """
    return read_hf_model(directory)[0]


def read_hf_model(directory: Path) -> tuple[ModelConfig, list[str]]:
    """Return the model of a checkpoint directory, and the keys of its config.json that no one reads.

    UserError as of `model_from_hf`.
    """
    hf = read_config(directory)
    refuse_other_architecture(hf)
    block_size(hf)  # refuses a quantization that is not supported
    kind = family(hf)
    hf.require("hidden_act", ("silu",), "silu")
    hf.require("tie_word_embeddings", (False,), False)
    hf.require("attention_bias", (False,), False)
    hf.require("mlp_bias", (False,), False)
    hf.require("moe_layer_freq", (1,), 1)
    hf.require("rope_interleave", (True,), True)
    layers, dense = hf.get("num_hidden_layers", int), hf.get("first_k_dense_replace", int)
    moe = _moe_from_hf(hf, kind)
    mtp_depths = _aliased(hf, "num_nextn_predict_layers", "num_mtp_layers", default=None) or 0
    if moe is None and mtp_depths:
        raise hf.error("num_nextn_predict_layers", mtp_depths, "is not supported without experts")
    model = ModelConfig(
        vocab_size=hf.get("vocab_size", int),
        dim=hf.get("hidden_size", int),
        num_layers=layers,
        # A small copy of a release may keep the release's count, which is then more than there are layers.
        num_dense_layers=layers if moe is None else min(dense, layers),
        dense_hidden_dim=hf.get("intermediate_size", int),
        attention=AttentionConfig(
            heads=hf.get("num_attention_heads", int),
            q_lora_rank=hf.get("q_lora_rank", int, nullable=True),
            kv_lora_rank=hf.get("kv_lora_rank", int),
            qk_nope_head_dim=hf.get("qk_nope_head_dim", int),
            qk_rope_head_dim=hf.get("qk_rope_head_dim", int),
            v_head_dim=hf.get("v_head_dim", int),
        ),
        moe=moe or _no_experts(kind),
        rope=rope_from_hf(hf),
        mtp_depths=mtp_depths,
        norm_eps=hf.get("rms_norm_eps", float),
        init_std=hf.get("initializer_range", float, 0.02),
    )
    try:
        validate(model)
    except InvalidValue as wrong:
        key = _HF_KEYS.get(wrong.key, wrong.key.rpartition(".")[2])
        raise UserError(f"{hf.file}: {key}={wrong.value} is not possible: {wrong.allowed}") from None
    _check_layer_types(hf, model)  # counts the layers: only now is their number known to be possible
    known = hf.used | NEUTRAL_KEYS
    return model, [key for key, value in hf.values.items() if key not in known and value is not None]


def _aliased(hf: HFValues, key: str, *aliases: str, default: Any = ...) -> Any:
    """Return the integer of `key`, which transformers also reads under other names; the names must agree."""
    present = [name for name in (key, *aliases) if hf.values.get(name) is not None]
    found = {name: hf.get(name, int) for name in present}
    for name, value in found.items():
        if value != found[present[0]]:
            raise hf.error(name, value, f"but {present[0]}={found[present[0]]}: which one is right?")
    return found[present[0]] if present else hf.get(key, int, default)


def _check_layer_types(hf: HFValues, model: ModelConfig) -> None:
    """Raise UserError unless `mlp_layer_types`, the newer key, says the same as first_k_dense_replace."""
    dense = min(max(model.num_dense_layers, 0), model.num_layers)
    types = hf.values.get("mlp_layer_types")
    if types not in (None, ["dense"] * dense + ["sparse"] * (model.num_layers - dense)):
        text = f"is not what first_k_dense_replace={dense} of {model.num_layers} layers says"
        raise hf.error("mlp_layer_types", types, text)


def _moe_from_hf(hf: HFValues, kind: str) -> MoEConfig | None:
    """Return routing and experts, None for a model of dense layers alone (n_routed_experts=null).

    UserError for a combination that DeepSeek's code does not have.
    """
    if hf.values.get("n_routed_experts", ...) is None and not _EXPERT_ALIASES & set(hf.values):
        hf.used |= {key for key in hf.values if key in _MOE_KEYS}
        return None
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
        num_experts=_aliased(hf, "n_routed_experts", *sorted(_EXPERT_ALIASES)),
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


def _no_experts(kind: str) -> MoEConfig:
    """Return the smallest experts, for a model that has no layer with any."""
    is_v2 = kind == "deepseek_v2"
    score = ScoreFunction.softmax if is_v2 else ScoreFunction.sigmoid
    return MoEConfig(1, 1, 0, 8, score_function=score, normalize_top_k=not is_v2, selection_bias=not is_v2)
