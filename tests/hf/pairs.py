"""Make pairs of a HuggingFace model and our model with the same weights."""

import json
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dsv3.config.strict import build
from dsv3.hf.config_json import model_from_hf
from dsv3.model.transformer import Transformer

RENAMED = [
    (r"^model\.embed_tokens\.", "embedding."),
    (r"^lm_head\.", "head."),
    (r"^model\.", ""),
    (r"\.self_attn\.", ".attention."),
    (r"\.q_a_layernorm\.", ".q_a_norm."),
    (r"\.kv_a_layernorm\.", ".kv_a_norm."),
    (r"\.kv_a_proj_with_mqa\.", ".kv_a_proj."),
    (r"\.input_layernorm\.", ".attention_norm."),
    (r"\.post_attention_layernorm\.", ".ffn_norm."),
    (r"\.mlp\.gate\.e_score_correction_bias$", ".ffn.router.selection_bias"),
    (r"\.mlp\.gate\.weight$", ".ffn.router.weight"),
    (r"\.mlp\.", ".ffn."),
]
"""HF's in-memory names -> ours, applied in order."""

SMALL: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 3,
    "first_k_dense_replace": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "n_routed_experts": 16,
    "num_experts_per_tok": 4,
    "n_shared_experts": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-6,
    "num_nextn_predict_layers": 0,
}


def our_name(name: str) -> str:
    """Return our name of a parameter or buffer of HF's."""
    for pattern, replacement in RENAMED:
        name = re.sub(pattern, replacement, name)
    return name


def pair(architecture: str, directory: Path, **changes: Any) -> tuple[nn.Module, Transformer]:
    """Return HF's model of a small config with random weights, and ours from its config.json."""
    import transformers

    name = {"deepseek_v3": "DeepseekV3", "deepseek_v2": "DeepseekV2"}[architecture]
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**{**SMALL, **changes})
    config._attn_implementation = "eager"
    theirs = getattr(transformers, f"{name}ForCausalLM")(config)
    _randomize(theirs)
    stored = {**config.to_dict(), **_released_keys(changes)}
    (directory / "config.json").write_text(json.dumps(stored))
    ours: Transformer = build(model_from_hf(directory))
    ours.load_state_dict({our_name(key): value for key, value in theirs.state_dict().items()})
    return theirs, ours


def _released_keys(changes: dict[str, Any]) -> dict[str, Any]:
    """Return the keys of released config.json files that HF's config class drops."""
    return {key: changes[key] for key in ("topk_method", "scoring_func") if key in changes}


def _randomize(model: nn.Module) -> None:
    """Set weights that bring logits to about 1 and every mechanism into play."""
    generator = torch.Generator().manual_seed(1)

    def random(shape: torch.Size) -> Tensor:
        return torch.randn(shape, generator=generator)

    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.copy_(1 + 0.2 * random(parameter.shape))
            else:
                parameter.copy_(random(parameter.shape) * 0.8 * parameter.shape[-1] ** -0.5)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.copy_(0.1 * random(buffer.shape))
