"""direction=dcp_to_hf and hf_to_hf: a released checkpoint that transformers loads."""

from pathlib import Path
from typing import Any

import torch

from dsv3.checkpoint.directory import TOKENIZER_DIR
from dsv3.checkpoint.export import copy_tokenizer
from dsv3.checkpoint.released.companions import HF_DIR, carry, write_json
from dsv3.checkpoint.released.names import Released, copies
from dsv3.checkpoint.released.shard_writer import index_json
from dsv3.checkpoint.released.shards import INDEX
from dsv3.checkpoint.released.sizes import parse_size
from dsv3.checkpoint.released.source import ReleasedSource
from dsv3.checkpoint.released.values import read_config
from dsv3.checkpoint.released.writer import config_json
from dsv3.checkpoint.sharded import DcpSource
from dsv3.convert.config import ConvertConfig, ScaleFormat, StoredType
from dsv3.convert.hf_target import Style, hf_outputs
from dsv3.convert.journal import Finished
from dsv3.convert.work import Work
from dsv3.model.config import ModelConfig

_NAMES = {StoredType.bf16: "bfloat16", StoredType.fp32: "float32", StoredType.fp8: "bfloat16"}
"""What config.json says of the tensors that are not in fp8."""


def to_hf(config: ConvertConfig, source: ReleasedSource | DcpSource, model: ModelConfig) -> Work:
    """Weights in safetensors files with their index, config.json and what came with the input."""
    known = _known_quantization(source)
    fmt = config.scale_fmt.value if config.scale_fmt else known.get("scale_fmt")
    style = Style(
        torch.float32 if config.dtype is StoredType.fp32 else torch.bfloat16,
        fp8=config.dtype is StoredType.fp8,
        power_of_two=fmt == ScaleFormat.ue8m0.value,
    )
    plans, outputs = hf_outputs(source, _tensors(source, model), style, parse_size(config.max_shard_size))
    origin = source.directory if isinstance(source, ReleasedSource) else source.directory / HF_DIR
    quantization = _quantization(known, source.block, fmt) if style.fp8 else None
    values = _config(origin, model, _NAMES[config.dtype], quantization)

    def complete(directory: Path, finished: list[Finished]) -> None:
        if len(plans) > 1:
            (directory / INDEX).write_text(index_json(plans))
        if origin.is_dir():
            carry(origin, directory)
        write_json(directory / "config.json", values)
        copy_tokenizer(source.directory / TOKENIZER_DIR, directory)

    return Work(outputs, complete)


def _tensors(source: ReleasedSource | DcpSource, model: ModelConfig) -> list[tuple[str, Released]]:
    """Every tensor to write with what it is read as: all of the layout, and the copies behind their layer."""
    by_name = {tensor.name: tensor for tensor in source.layout}
    tensors = list(by_name.items())
    if source.has_copies:
        tensors += [(copy, by_name[name]) for copy, name in copies(model).items()]
    return tensors


def _known_quantization(source: ReleasedSource | DcpSource) -> dict[str, Any]:
    """The quantization_config that the weights came with."""
    return dict(source.quantization or {})


def _quantization(known: dict[str, Any], block: tuple[int, int], fmt: str | None) -> dict[str, Any]:
    style = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8"}
    values = style | known | {"weight_block_size": list(block)}
    values.pop("scale_fmt", None)
    return values | ({"scale_fmt": fmt} if fmt == ScaleFormat.ue8m0.value else {})


def _config(
    origin: Path, model: ModelConfig, dtype: str, quantization: dict[str, Any] | None
) -> dict[str, Any]:
    """The config.json that came with the weights, or a new one, with the types that are written."""
    carried = (origin / "config.json").is_file()
    values = dict(read_config(origin).values) if carried else config_json(model, dtype)
    values.pop("quantization_config", None)
    if model.mtp_depths == 0:
        values.pop("num_nextn_predict_layers", None)
    values["dtype" if "dtype" in values else "torch_dtype"] = dtype
    return values | ({"quantization_config": quantization} if quantization else {})
