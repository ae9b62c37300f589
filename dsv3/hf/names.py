"""Our parameters by the names of released checkpoints (the names that HF's models save).

A released checkpoint holds one tensor an expert and projection, where ours are stacked; and it holds
the MTP depths as layers behind the last one, with copies of the shared embedding and head.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from dsv3.config.model import ModelConfig

SCALE = "_scale_inv"
"""What a block-fp8 weight's name ends with where its scales are stored."""


@dataclass(frozen=True)
class Part:
    """One tensor of a released checkpoint and its place, `parameter[index][rows]`; None is all of it."""

    source: str
    parameter: str
    index: int | None = None
    """Which expert of a stack [experts, out, in]."""
    rows: tuple[int, int] | None = None
    """Which rows of the expert's matrix: gate and up lie behind each other."""


_MODEL = {
    "embedding.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "head.weight": "lm_head.weight",
}

_BLOCK = {
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attention.q_proj": "self_attn.q_proj",
    "attention.q_a_proj": "self_attn.q_a_proj",
    "attention.q_a_norm": "self_attn.q_a_layernorm",
    "attention.q_b_proj": "self_attn.q_b_proj",
    "attention.kv_a_proj": "self_attn.kv_a_proj_with_mqa",
    "attention.kv_a_norm": "self_attn.kv_a_layernorm",
    "attention.kv_b_proj": "self_attn.kv_b_proj",
    "attention.o_proj": "self_attn.o_proj",
    "ffn.router": "mlp.gate",
    "ffn": "mlp",
    "ffn.shared_experts": "mlp.shared_experts",
}

_MTP = {
    "embedding_norm": "enorm",
    "hidden_norm": "hnorm",
    "projection": "eh_proj",
    "norm": "shared_head.norm",
}

_RELEASED_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")

_LAYER = re.compile(r"(layers|mtp)\.(\d+)\.(.+)")


def released_parts(parameter: str, config: ModelConfig) -> Iterator[Part]:
    """The tensors of a released checkpoint that make up one parameter or buffer of ours.

    KeyError for a name that no model of this family has.
    """
    if parameter in _MODEL:
        yield Part(_MODEL[parameter], parameter)
        return
    found = _LAYER.fullmatch(parameter)
    if found is None:
        raise KeyError(parameter)
    kind, number, rest = found[1], int(found[2]), found[3]
    layer = f"model.layers.{number + (config.num_layers if kind == 'mtp' else 0)}"
    if kind == "mtp":
        module, _, leaf = rest.rpartition(".")
        if module in _MTP:
            yield Part(f"{layer}.{_MTP[module]}.{leaf}", parameter)
            return
        rest = rest.removeprefix("block.")
    yield from _block_parts(parameter, layer, rest, config)


def _block_parts(parameter: str, layer: str, rest: str, config: ModelConfig) -> Iterator[Part]:
    hidden = config.moe.hidden_dim
    if rest.startswith("ffn.experts."):
        for expert in range(config.moe.num_experts):
            name = f"{layer}.mlp.experts.{expert}"
            if rest.endswith("gate_up_proj"):
                yield Part(f"{name}.gate_proj.weight", parameter, expert, (0, hidden))
                yield Part(f"{name}.up_proj.weight", parameter, expert, (hidden, 2 * hidden))
            else:
                yield Part(f"{name}.down_proj.weight", parameter, expert)
    elif rest == "ffn.router.selection_bias":
        yield Part(f"{layer}.mlp.gate.e_score_correction_bias", parameter)
    else:
        module, _, leaf = rest.rpartition(".")
        parent, _, last = module.rpartition(".")
        theirs = _BLOCK[module] if module in _BLOCK else f"{_BLOCK[parent]}.{last}"
        yield Part(f"{layer}.{theirs}.{leaf}", parameter)


@dataclass(frozen=True)
class HFTensor:
    """One tensor of a released checkpoint with its shape, and the box of our parameter that it fills."""

    name: str
    shape: tuple[int, ...]
    parameter: str
    """Our name, that of the model's state_dict."""
    offset: tuple[int, ...]
    sizes: tuple[int, ...]
    """Of the box: an expert's matrix has a leading 1."""

    def box_of_rows(self, first: int, count: int) -> tuple[list[int], list[int]]:
        """Offset and sizes of the box that rows [first, first + count) of the released tensor fill."""
        offset, sizes = list(self.offset), list(self.sizes)
        if offset:
            dim = len(offset) - len(self.shape)  # behind the expert's, if there is one
            offset[dim] += first
            sizes[dim] = count
        return offset, sizes


def released_layout(config: ModelConfig, shapes: dict[str, tuple[int, ...]]) -> list[HFTensor]:
    """Every tensor of a released checkpoint in our order, for parameters of these `shapes` by name.

    The copies that MTP layers have of the embedding and the head are not among them (see `mtp_duplicates`).
    """
    return [_released(part, shape) for name, shape in shapes.items() for part in released_parts(name, config)]


def mtp_duplicates(config: ModelConfig) -> dict[str, str]:
    """What a released checkpoint stores again with each MTP layer: the copy's name, and what it is of."""
    found = {}
    for depth in range(config.mtp_depths):
        layer = f"model.layers.{config.num_layers + depth}"
        found[f"{layer}.embed_tokens.weight"] = _MODEL["embedding.weight"]
        found[f"{layer}.shared_head.head.weight"] = _MODEL["head.weight"]
    return found


def is_derived(name: str, config: ModelConfig) -> bool:
    """Whether a stored tensor may be passed over: it follows from config.json, or its MTP layer is left out.

    Moonlight and Kimi K2 store the rotary frequencies.
    """
    layer = _RELEASED_LAYER.fullmatch(name)
    if layer is None:
        return False
    last = config.num_layers + config.mtp_depths
    left_out = config.mtp_depths == 0 and int(layer[1]) >= last
    return left_out or (int(layer[1]) < last and layer[2] == "self_attn.rotary_emb.inv_freq")


def _released(part: Part, whole: tuple[int, ...]) -> HFTensor:
    if part.index is None:
        return HFTensor(part.source, whole, part.parameter, (0,) * len(whole), whole)
    first, end = part.rows or (0, whole[1])
    shape = (end - first, whole[2])
    return HFTensor(part.source, shape, part.parameter, (part.index, first, 0), (1, *shape))


_QUANTIZED = re.compile(
    r"model\.layers\.\d+\."
    r"(self_attn\.(q_proj|q_a_proj|q_b_proj|kv_a_proj_with_mqa|kv_b_proj|o_proj)"
    r"|mlp\.(experts\.\d+\.|shared_experts\.)?(gate_proj|up_proj|down_proj))\.weight"
)


def is_quantized(name: str) -> bool:
    """Whether DeepSeek stores this tensor in fp8: the matrices of attention, experts and dense layers.

    Embedding, head, norms, router and the MTP projection are not (config.json's modules of DeepSeek-V3).
    """
    return _QUANTIZED.fullmatch(name) is not None


def stored_dtype(tensor: HFTensor, dtype: torch.dtype) -> torch.dtype:
    """What a tensor is stored as: selection biases move by steps that only fp32 has room for."""
    return torch.float32 if tensor.parameter.endswith("selection_bias") else dtype
