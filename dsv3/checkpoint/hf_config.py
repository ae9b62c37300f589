"""A model's numbers from the config.json of a HuggingFace checkpoint."""

import json
from pathlib import Path
from typing import Any

from dsv3.model.config import (
    AttentionConfig,
    ModelConfig,
    MoEConfig,
    RopeConfig,
    RopeScaling,
    ScoreFunction,
)
from dsv3.runtime.errors import UserError

ARCHITECTURES = ("deepseek_v3", "deepseek_v2", "kimi_k2")
METHODS = ("noaux_tc", "group_limited_greedy", "greedy")
"""HF's `topk_method`: with a selection bias, with groups scored by their maximum, without groups."""


class HFConfig:
    """config.json as asked for key by key; every error names the file and the key."""

    def __init__(self, directory: Path) -> None:
        self.path = directory / "config.json"
        try:
            self.values: dict[str, Any] = json.loads(self.path.read_text())
        except FileNotFoundError:
            raise UserError(
                f"model.path={directory} holds no config.json: give a HuggingFace checkpoint"
            ) from None
        except (OSError, ValueError) as error:
            raise UserError(f"{self.path} cannot be read: {error}") from None
        if not isinstance(self.values, dict):
            raise UserError(f"{self.path} is no JSON object")

    def get(self, key: str, kind: type, default: Any = ...) -> Any:
        """The value of `key`, which must be of `kind` (an int passes for a float)."""
        value = self.values.get(key, default)
        if value is ...:
            raise UserError(
                f"{self.path} has no '{key}', which a {self.values.get('model_type')} model needs"
            )
        if value is None and default is None:
            return None
        right = isinstance(value, (int, float) if kind is float else kind) and (
            kind is bool or not isinstance(value, bool)
        )
        if not right:
            raise UserError(f"{self.path}: {key}={value!r} must be of type {kind.__name__}")
        return kind(value)

    def require(self, key: str, allowed: tuple[Any, ...], default: Any) -> Any:
        """The value of `key`, one of `allowed`."""
        value = self.values.get(key, default)
        if value not in allowed:
            choices = ", ".join(map(str, allowed))
            raise UserError(f"{self.path}: {key}={value!r} is not supported; supported: {choices}")
        return value


def model_from_hf(directory: Path) -> ModelConfig:
    """The model of a checkpoint directory; UserError for a missing key or a value that is not supported."""
    hf = HFConfig(directory)
    hf.require("model_type", ARCHITECTURES, None)
    hf.require("hidden_act", ("silu",), "silu")
    hf.require("tie_word_embeddings", (False,), False)
    hf.require("attention_bias", (False,), False)
    hf.require("moe_layer_freq", (1,), 1)
    hf.require("rope_interleave", (True,), True)
    _check_quantization(hf)
    return ModelConfig(
        vocab_size=hf.get("vocab_size", int),
        dim=hf.get("hidden_size", int),
        num_layers=hf.get("num_hidden_layers", int),
        num_dense_layers=hf.get("first_k_dense_replace", int),
        dense_hidden_dim=hf.get("intermediate_size", int),
        attention=_attention(hf),
        moe=_moe(hf),
        rope=_rope(hf),
        mtp_depths=hf.get("num_nextn_predict_layers", int, 0) or 0,
        norm_eps=hf.get("rms_norm_eps", float),
        init_std=hf.get("initializer_range", float, 0.02),
    )


def _check_quantization(hf: HFConfig) -> None:
    """Weights may be block-fp8 as DeepSeek released them; other formats cannot be read."""
    stored = hf.values.get("quantization_config")
    if stored is None:
        return
    method = stored.get("quant_method") if isinstance(stored, dict) else stored
    block = stored.get("weight_block_size") if isinstance(stored, dict) else None
    if method != "fp8" or block != [128, 128]:
        raise UserError(
            f"{hf.path}: quantization_config with quant_method={method!r}, weight_block_size={block} is not "
            "supported; supported: none, or fp8 with [128, 128]"
        )


def _attention(hf: HFConfig) -> AttentionConfig:
    heads = hf.get("num_attention_heads", int)
    hf.require("num_key_value_heads", (heads,), heads)
    return AttentionConfig(
        heads=heads,
        q_lora_rank=hf.get("q_lora_rank", int, None),
        kv_lora_rank=hf.get("kv_lora_rank", int),
        qk_nope_head_dim=hf.get("qk_nope_head_dim", int),
        qk_rope_head_dim=hf.get("qk_rope_head_dim", int),
        v_head_dim=hf.get("v_head_dim", int),
    )


def _moe(hf: HFConfig) -> MoEConfig:
    v3 = hf.values["model_type"] != "deepseek_v2"
    method = hf.require("topk_method", METHODS, "noaux_tc" if v3 else "greedy")
    score = hf.require("scoring_func", ("sigmoid", "softmax"), "sigmoid" if v3 else "softmax")
    grouped = method != "greedy"
    return MoEConfig(
        num_experts=hf.get("n_routed_experts", int),
        top_k=hf.get("num_experts_per_tok", int),
        num_shared_experts=hf.get("n_shared_experts", int, None) or 0,
        hidden_dim=hf.get("moe_intermediate_size", int),
        score_function=ScoreFunction[score],
        num_groups=hf.get("n_group", int, 1) if grouped else 1,
        top_k_groups=hf.get("topk_group", int, 1) if grouped else 1,
        route_scale=hf.get("routed_scaling_factor", float, 1.0),
        normalize_top_k=hf.get("norm_topk_prob", bool, v3),
        selection_bias=method == "noaux_tc",
    )


def _rope(hf: HFConfig) -> RopeConfig:
    """Rotary numbers from `rope_parameters` (transformers 5) or `rope_theta` with `rope_scaling` (before)."""
    scaling = hf.values.get("rope_parameters") or hf.values.get("rope_scaling") or {}
    theta = float(scaling.get("rope_theta") or hf.get("rope_theta", float, 10000.0))
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    length = hf.get("max_position_embeddings", int, 4096)
    if kind in ("default", None):
        return RopeConfig(theta=theta, original_sequence_length=length)
    if kind != "yarn":
        raise UserError(
            f"{hf.path}: rope scaling of type {kind!r} is not supported; supported: default, yarn"
        )
    if "factor" not in scaling:
        raise UserError(f"{hf.path}: the yarn scaling has no 'factor'")
    return RopeConfig(
        theta=theta,
        scaling=RopeScaling.yarn,
        factor=float(scaling["factor"]),
        original_sequence_length=int(scaling.get("original_max_position_embeddings", length)),
        beta_fast=float(scaling.get("beta_fast", 32.0)),
        beta_slow=float(scaling.get("beta_slow", 1.0)),
        mscale=float(scaling.get("mscale", 1.0)),
        mscale_all_dim=float(scaling.get("mscale_all_dim", 0.0)),
    )
