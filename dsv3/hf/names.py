"""Our parameter names and those of HuggingFace checkpoints, as one table.

An HF checkpoint stores one matrix per expert and projection; our parameters stack the experts. It stores the
MTP depths as layers behind the last one, each with duplicates of the shared embedding and head.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from dsv3.config.model import ModelConfig

HF_NAMES: dict[str, str | tuple[str, str]] = {
    "embedding.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "head.weight": "lm_head.weight",
    # Of layer L, in the main model (layers.L) and in an MTP depth (mtp.N.block, L = num_layers + N).
    "layers.L.attention_norm.weight": "model.layers.L.input_layernorm.weight",
    "layers.L.attention.q_proj.weight": "model.layers.L.self_attn.q_proj.weight",
    "layers.L.attention.q_a_proj.weight": "model.layers.L.self_attn.q_a_proj.weight",
    "layers.L.attention.q_a_norm.weight": "model.layers.L.self_attn.q_a_layernorm.weight",
    "layers.L.attention.q_b_proj.weight": "model.layers.L.self_attn.q_b_proj.weight",
    "layers.L.attention.kv_a_proj.weight": "model.layers.L.self_attn.kv_a_proj_with_mqa.weight",
    "layers.L.attention.kv_a_norm.weight": "model.layers.L.self_attn.kv_a_layernorm.weight",
    "layers.L.attention.kv_b_proj.weight": "model.layers.L.self_attn.kv_b_proj.weight",
    "layers.L.attention.o_proj.weight": "model.layers.L.self_attn.o_proj.weight",
    "layers.L.ffn_norm.weight": "model.layers.L.post_attention_layernorm.weight",
    # A dense layer.
    "layers.L.ffn.gate_proj.weight": "model.layers.L.mlp.gate_proj.weight",
    "layers.L.ffn.up_proj.weight": "model.layers.L.mlp.up_proj.weight",
    "layers.L.ffn.down_proj.weight": "model.layers.L.mlp.down_proj.weight",
    # An MoE layer. selection_bias is the expert bias of aux-loss-free load balancing.
    "layers.L.ffn.router.weight": "model.layers.L.mlp.gate.weight",
    "layers.L.ffn.router.selection_bias": "model.layers.L.mlp.gate.e_score_correction_bias",
    "layers.L.ffn.shared_experts.gate_proj.weight": "model.layers.L.mlp.shared_experts.gate_proj.weight",
    "layers.L.ffn.shared_experts.up_proj.weight": "model.layers.L.mlp.shared_experts.up_proj.weight",
    "layers.L.ffn.shared_experts.down_proj.weight": "model.layers.L.mlp.shared_experts.down_proj.weight",
    # Stacks [experts, out, in]: one HF tensor per expert E; gate and up are the upper and lower rows of one
    # matrix.
    "layers.L.ffn.experts.gate_up_proj": (
        "model.layers.L.mlp.experts.E.gate_proj.weight",
        "model.layers.L.mlp.experts.E.up_proj.weight",
    ),
    "layers.L.ffn.experts.down_proj": "model.layers.L.mlp.experts.E.down_proj.weight",
    # The modules of MTP depth N beside its block, L = num_layers + N.
    "mtp.N.embedding_norm.weight": "model.layers.L.enorm.weight",
    "mtp.N.hidden_norm.weight": "model.layers.L.hnorm.weight",
    "mtp.N.projection.weight": "model.layers.L.eh_proj.weight",
    "mtp.N.norm.weight": "model.layers.L.shared_head.norm.weight",
}
"""Our name -> HF name. Two HF names share one of our matrices, row halves in this order."""

MTP_DUPLICATES = {
    "model.layers.L.embed_tokens.weight": "model.embed_tokens.weight",
    "model.layers.L.shared_head.head.weight": "lm_head.weight",
}
"""Duplicates that an HF checkpoint stores with each MTP layer L -> the tensor that they duplicate."""

SCALE_SUFFIX = "_scale_inv"
"""Ending of the HF tensor that holds the scale grid of a block-fp8 weight."""

MODEL_PREFIX = "model."
"""Prefix of the model's tensors in our own checkpoints."""

_OUR_LAYER = re.compile(r"(layers|mtp)\.(\d+)\.(.+)")

_HF_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")

_MTP_MODULES = ("enorm.", "hnorm.", "eh_proj.", "shared_head.", "embed_tokens.")

_FP8_WEIGHT = re.compile(
    r"model\.layers\.\d+\."
    r"(self_attn\.(q_proj|q_a_proj|q_b_proj|kv_a_proj_with_mqa|kv_b_proj|o_proj)"
    r"|mlp\.(experts\.\d+\.|shared_experts\.)?(gate_proj|up_proj|down_proj))\.weight"
)


@dataclass(frozen=True)
class HFTensor:
    """One tensor of an HF checkpoint with its shape, and the box of our parameter that it fills."""

    name: str
    shape: tuple[int, ...]
    parameter: str
    """Our name, as in the model's state_dict."""
    offset: tuple[int, ...]
    sizes: tuple[int, ...]
    """Sizes of the box; that of an expert's matrix has a leading 1."""

    def box_of_rows(self, first: int, count: int) -> tuple[list[int], list[int]]:
        """Return offset and sizes of the box that rows [first, first + count) of the HF tensor fill."""
        offset, sizes = list(self.offset), list(self.sizes)
        if offset:
            dim = len(offset) - len(self.shape)  # behind the expert's dim, if there is one
            offset[dim] += first
            sizes[dim] = count
        return offset, sizes


def hf_layout(config: ModelConfig, shapes: dict[str, tuple[int, ...]]) -> list[HFTensor]:
    """Return every tensor of an HF checkpoint in our order, for parameters of these `shapes` by name.

    The duplicates that MTP layers store of embedding and head are left out (see `mtp_duplicates`).
    KeyError for a name that no model of this family has.
    """
    layout = []
    for parameter, shape in shapes.items():
        row, layer = _table_row(parameter, config)
        named = HF_NAMES[row]
        hf_names = (named,) if isinstance(named, str) else named
        if ".experts." not in row:
            name = hf_names[0].replace(".L.", f".{layer}.")
            layout.append(HFTensor(name, shape, parameter, (0,) * len(shape), shape))
            continue
        experts, rows, columns = shape
        matrix = (rows // len(hf_names), columns)
        for expert in range(experts):
            for number, template in enumerate(hf_names):
                name = template.replace(".L.", f".{layer}.").replace(".E.", f".{expert}.")
                offset = (expert, number * matrix[0], 0)
                layout.append(HFTensor(name, matrix, parameter, offset, (1, *matrix)))
    return layout


def _table_row(parameter: str, config: ModelConfig) -> tuple[str, int | None]:
    """Return the key of HF_NAMES for a parameter and the number of its HF layer (None outside of layers)."""
    found = _OUR_LAYER.fullmatch(parameter)
    if found is None:
        return parameter, None
    kind, number, rest = found[1], int(found[2]), found[3]
    if kind == "layers":
        return f"layers.L.{rest}", number
    in_block = rest.startswith("block.")
    row = f"layers.L.{rest.removeprefix('block.')}" if in_block else f"mtp.N.{rest}"
    return row, config.num_layers + number


def mtp_duplicates(config: ModelConfig) -> dict[str, str]:
    """Return the names of the duplicates that MTP layers store, each with the tensor that it duplicates."""
    layers = range(config.num_layers, config.num_layers + config.mtp_depths)
    return {
        duplicate.replace(".L.", f".{layer}."): original
        for layer in layers
        for duplicate, original in MTP_DUPLICATES.items()
    }


def with_mtp_duplicates(layout: Iterable[HFTensor], config: ModelConfig) -> list[tuple[str, HFTensor]]:
    """Return (HF name, tensor to read) for all of `layout` and, behind it, for the MTP duplicates."""
    by_name = {tensor.name: tensor for tensor in layout}
    return [*by_name.items(), *((name, by_name[of]) for name, of in mtp_duplicates(config).items())]


def layer_number(name: str) -> int:
    """Return the layer that an HF tensor belongs to, -1 outside of layers."""
    layer = _HF_LAYER.fullmatch(name)
    return -1 if layer is None else int(layer[1])


def is_mtp_module(name: str) -> bool:
    """Return whether an HF tensor is one that MTP layers alone have, beside their transformer block."""
    layer = _HF_LAYER.fullmatch(name)
    return layer is not None and layer[2].startswith(_MTP_MODULES)


def is_derived(name: str, config: ModelConfig) -> bool:
    """Return whether loading may pass over an HF tensor.

    True for the rotary frequencies that Moonlight and Kimi K2 store, which follow from config.json, and for
    the last layers, main or MTP, that the model leaves out: the command has asked for fewer by name
    (config/model_difference.py).
    """
    layer = _HF_LAYER.fullmatch(name)
    if layer is None:
        return False
    last = config.num_layers + config.mtp_depths
    return int(layer[1]) >= last or layer[2] == "self_attn.rotary_emb.inv_freq"


def is_fp8_weight(name: str) -> bool:
    """Return whether DeepSeek's releases store this tensor in fp8.

    Matrices of attention, experts and dense layers are in fp8. Embedding, head, norms, router and the MTP
    projection stay in bf16 (config.json's modules of DeepSeek-V3).
    """
    return _FP8_WEIGHT.fullmatch(name) is not None


def stored_dtype(tensor: HFTensor, dtype: torch.dtype, came: torch.dtype = torch.float32) -> torch.dtype:
    """Return the dtype in files: `dtype`, but fp32 for expert biases, whose small steps bf16 loses.

    `came` is the dtype of the values in what is converted: biases that came in bf16 leave in `dtype` as well.
    """
    is_bias = tensor.parameter.endswith("selection_bias")
    return torch.float32 if is_bias and came is not torch.bfloat16 else dtype
