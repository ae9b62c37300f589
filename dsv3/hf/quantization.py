"""Read how the weights of an HF checkpoint are quantized: DeepSeek's block-fp8, or not at all.

`quantization_config` of config.json says so, and for some formats only a file beside it. Every other format
is refused by name, before the first tensor is looked at.
"""

from pathlib import Path
from typing import Any

from dsv3.errors import UserError, quoted
from dsv3.hf.config_values import HFValues
from dsv3.planning.sharding import FP8_BLOCK
from dsv3.untrusted_files import read_json, refuse_lfs_pointer

_METHODS = {
    "auto-round": "integers packed by AutoRound",
    "awq": "4-bit integers packed by AWQ",
    "bitsandbytes": "codes of bitsandbytes",
    "compressed-tensors": "codes packed by compressed-tensors, INT4 for one",
    "gptq": "integers packed by GPTQ",
    "modelopt": "codes of ModelOpt, NVFP4 for one",
    "mxfp4": "4-bit floats in blocks of 32",
}
"""quant_method of other formats -> what the weights are stored as."""

LARGEST_BLOCK = 2**20
"""Rows or columns of a block that shares a scale; DeepSeek's have 128."""

_WAY_ON = "take the release in bf16 or in DeepSeek's block-fp8"

_QUANTIZATION_FILES = {
    "hf_quant_config.json": "ModelOpt",
    "quantize_config.json": "GPTQ",
    "quant_config.json": "AWQ",
}
"""Files beside config.json that say how the weights are quantized -> the library that writes them."""

_ALGORITHM_KEYS = ("quant_algo", "quant_method", "format", "bits", "w_bit", "group_size")


def block_size(hf: HFValues) -> tuple[int, int]:
    """Return the rows and columns of a block-fp8 weight that share a scale; without quantization (128, 128).

    UserError for a format other than DeepSeek's.
    """
    for key in ("quantization", "compression_config"):
        if algorithm := _algorithm(hf.values.get(key)):
            text = f"has '{key}' with {algorithm}, which is not supported"
            raise UserError(f"{hf.file} {text}; {_WAY_ON}")
    for name, library in _QUANTIZATION_FILES.items():
        file = hf.file.with_name(name)
        if algorithm := _algorithm(_content(file)):
            text = f"quantizes the weights by {library}: {algorithm}, which is not supported"
            raise UserError(f"{file} {text}; {_WAY_ON}")
    stored = hf.node("quantization_config")
    if stored is None:
        return FP8_BLOCK, FP8_BLOCK
    method, block, form = map(stored.values.get, ("quant_method", "weight_block_size", "fmt"))
    listed = block if isinstance(block, list) else []
    sides = listed if all(type(side) is int and 0 < side <= LARGEST_BLOCK for side in listed) else []
    if method != "fp8" or len(sides) != 2 or form not in (None, "e4m3"):
        known = f" ({_METHODS[method]})" if isinstance(method, str) and method in _METHODS else ""
        told = f"quant_method={quoted(method)}, weight_block_size={quoted(block)}, fmt={quoted(form)}"
        raise UserError(
            f"{hf.file}: quantization_config with {told} is not supported{known}; "
            f"supported: none, or fp8 with two block sides and e4m3; {_WAY_ON}"
        )
    return sides[0], sides[1]


def _content(file: Path) -> Any:
    """Return what a JSON file beside config.json says of the weights, None where there is no such file."""
    if not file.is_file():
        return None
    refuse_lfs_pointer(file)
    values = read_json(file)
    return values.get("quantization", values) if isinstance(values, dict) else values


def _algorithm(node: Any) -> str:
    """Return the keys of a quantization that name its algorithm, empty where it names none."""
    if not isinstance(node, dict):
        return quoted(node) if node else ""
    named = {key: node[key] for key in _ALGORITHM_KEYS if node.get(key)}
    return ", ".join(f"{key}={quoted(value)}" for key, value in named.items())
