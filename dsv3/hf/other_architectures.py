"""Refuse checkpoints of other architectures: by the class, the keys and the tensors that name them.

A key that this model does not have would be passed over in silence, and other numbers computed. Each refusal
names what was read, says why it is refused, and the way on.
"""

import re
from typing import Any

from dsv3.errors import UserError
from dsv3.hf.config_values import HFValues
from dsv3.hf.neutral_keys import NEUTRAL_KEYS

ARCHITECTURES = {
    "deepseek_v3": "DeepseekV3ForCausalLM",
    "kimi_k2": "DeepseekV3ForCausalLM",
    "deepseek_v2": "DeepseekV2ForCausalLM",
}
"""transformers' model class by `model_type`."""

_SPARSE = "its attention reads only the keys that an indexer picks, which this model does not compute"

_OTHER_MODELS = {
    "deepseek": (
        "DeepseekForCausalLM",
        f"DeepSeek-V1 has no latent attention; read are {', '.join(ARCHITECTURES)}",
    ),
    "deepseek_v32": (
        "DeepseekV32ForCausalLM",
        f"DeepSeek-V3.2: {_SPARSE}; DeepSeek-V3.1 has the same layers with full attention",
    ),
    "deepseek_v4": (
        "DeepseekV4ForCausalLM",
        "DeepSeek-V4 has compressed attention and hyper-connections, which this model does not "
        "compute; the newest release that is read is DeepSeek-V3.1",
    ),
    "glm_moe_dsa": ("GlmMoeDsaForCausalLM", f"GLM-5: {_SPARSE}; no GLM is read"),
    "glm4_moe_lite": (
        "Glm4MoeLiteForCausalLM",
        "GLM-4.7-Flash was never compared with this model; no GLM is read",
    ),
    "kimi_linear": (
        "KimiLinearForCausalLM",
        "Kimi Linear has linear attention, which this model does not compute; Moonlight and Kimi-K2 are read",
    ),
    "kimi_k25": (
        "KimiK25ForConditionalGeneration",
        "Kimi-K2.5 is a model of images; Kimi-K2, its text model's architecture, is read",
    ),
    "youtu": (
        "YoutuForCausalLM",
        "Youtu-LLM ties its head to the embedding and has no experts; this model does neither",
    ),
    "minicpm3": ("MiniCPM3ForCausalLM", "MiniCPM3 scales its activations, which this model does not compute"),
    "longcat_flash": (
        "LongcatFlashForCausalLM",
        "LongCat-Flash has two attentions per layer and zero experts, which this model lacks",
    ),
}
"""Other models with latent attention or DeepSeek's name, by `model_type` -> class, why they are refused."""

_OTHER_CLASSES = {name: kind for kind, (name, _) in _OTHER_MODELS.items()}
"""The classes of `_OTHER_MODELS`, which `architectures` names."""

_WRAPPERS = ("text_config", "language_config", "llm_config", "thinker_config")
"""Keys with a text model inside a model of images or sound."""

_OFF: tuple[Any, ...] = (None, False, 0, "", [], {})
"""Values with which a key of another architecture switches its mechanism off."""

_FACTORS = (*_OFF, 1)

_OTHER_KEYS: list[tuple[str, str, tuple[Any, ...]]] = [
    (r"index_.*|indexer_.*|dsa_.*", "an indexer of sparse attention", _OFF),
    (r"swiglu_.*|.*_swiglu_limit", "limits in SwiGLU", _OFF),
    (r".*soft_?cap(ping)?", "soft caps of logits", _OFF),
    (r"sliding_window.*|attention_chunk_size|(attention_)?window_size|local_attention.*", "windows", _OFF),
    (r"linear_.*|full_attn_.*|kda_.*|mla_use_nope|mamba_.*|ssm_.*|conv_.*", "linear attention", _OFF),
    (r"hc_.*|compress_.*|num_hash_layers|o_groups|o_lora_rank|expert_dtype", "DeepSeek-V4", _OFF),
    (
        r".*_multipliers?|logits?_scal(e|ing)|scale_emb|scale_depth|embedding_scale|residual_scale|attn_scale"
        r"|attention_value_scale|qk_scale_factor|query_pre_attn_scalar|dim_model_base|.*mup.*",
        "factors on activations",
        _FACTORS,
    ),
    (r"(use_)?qk_(layer_?)?norms?(_type)?", "norms of queries and keys", _OFF),
    (r"partial_rotary_factor", "a part of a head without rotation", (None, 1)),
    (r"rope_local_.*|layer_rope_.*|no_rope_.*|rotary_dim|rope_layers", "another rotary embedding", _OFF),
    (r"clip_qkv|alibi|attn_temperature_.*|floor_scale|.*_sinks?(_.*)?", "another attention", _OFF),
    (r".*parallel_residual|parallel_attn|use_post_norm|post_norm_.*|use_sandwich_norm", "other blocks", _OFF),
    (r"use_attention_gate|.*output_gate.*|use_bidirectional_attention", "another attention", _OFF),
    (r".*qkv_bias|(use|add)_bias(_.*)?|lm_head_bias|attention_out_bias", "biases of projections", _OFF),
    (r"zero_expert.*|.*ngram.*|ple_.*|altup_.*|laurel_.*|num_kv_shared_layers", "other layers", _OFF),
    (r"mlp_only_layers|moe_layer_(interval|start_index|end_index)|moe_layers", "its choice of layers", _OFF),
    (r"decoder_sparse_step|interleave_moe_layer_step", "its choice of layers", _FACTORS),
    (r"per_layer_config|num_attention_heads_per_layer", "layers of different shapes", _OFF),
]
"""Keys of other architectures as a pattern, the mechanism that they set, and the values without effect."""

_OTHER_TENSORS = [
    (r".*\.indexer\..*", f"a tensor of DeepSeek-V3.2: {_SPARSE}", "take a release with full attention"),
    (
        r".*\.(weight_packed|weight_scale|weight_scale_2|weight_global_scale|weight_shape|weight_zero_point"
        r"|input_scale|input_global_scale|qweight|qzeros|g_idx|absmax|quant_map|quant_state.*)",
        "of a quantization that is not read",
        "take the release in bf16 or in DeepSeek's block-fp8",
    ),
    (
        r"(model\.)?(language_model|text_model|vision_\w+|visual|mm_projector|multi_modal_projector|thinker"
        r"|audio_tower)\..*",
        "of a model of images or sound around a text model",
        "take a release of the text model alone",
    ),
    (r".*\.lora_[AB]\..*|base_model\..*", "of an adapter", "merge the adapter into its base model first"),
    (r".*\.(attn_sinks?|sinks)|.*\.hc_\w+.*", "of another architecture", "see docs/models.md"),
]
"""Names of tensors of other architectures and formats as a pattern, what they are of, and the way on."""


def refuse_other_architecture(hf: HFValues) -> None:
    """Raise UserError for a config.json of another architecture, or with a key that only others have."""
    names = hf.values.get("architectures")
    classes = names if isinstance(names, list) else [names]
    for key, found in (("architectures", classes), ("model_type", [hf.values.get("model_type")])):
        for each in found:
            model = _OTHER_CLASSES.get(str(each), str(each))
            # YoutuForCausalLM comes with the model_type of DeepSeek-V2: the class is what computes.
            if model in _OTHER_MODELS:
                raise hf.error(key, hf.values[key], f"is not supported: {_OTHER_MODELS[model][1]}")
    for key in _WRAPPERS:
        if isinstance(hf.values.get(key), dict):
            text = f"has its text model in '{key}' of a larger one, which is not supported"
            raise UserError(f"{hf.file} {text}; take a release of the text model alone")
    for key, value in hf.values.items():
        if mechanism := _mechanism(hf, key, value):
            text = f"is not supported: it sets {mechanism}, which DeepSeek-V2 and V3 do not have"
            raise hf.error(key, value, f"{text}; remove the key if the weights do without")


def _mechanism(hf: HFValues, key: str, value: Any) -> str:
    """Return the mechanism that a key of another architecture switches on, empty for any other key."""
    if key in NEUTRAL_KEYS:
        return ""
    if key == "layer_types":
        whole = isinstance(value, list) and set(map(str, value)) <= {"full_attention"}
        return "" if whole or value is None else "layers of other kinds"
    if key.startswith("sliding_window") and hf.values.get("use_sliding_window") is False:
        return ""
    for pattern, mechanism, off in _OTHER_KEYS:
        if re.fullmatch(pattern, key):
            return "" if value in off else mechanism
    return ""


def other_tensor(name: str) -> str:
    """Return why a tensor tells of another architecture or format, and the way on; empty for any other."""
    found = _ANY_OTHER_TENSOR.fullmatch(name)
    if found is None:
        return ""
    number = next(index for index in range(len(_OTHER_TENSORS)) if found[f"r{index}"] is not None)
    _, what, way = _OTHER_TENSORS[number]
    return f"{what}: {way}"


_ANY_OTHER_TENSOR = re.compile(
    "|".join(f"(?P<r{number}>{pattern})" for number, (pattern, *_) in enumerate(_OTHER_TENSORS))
)
