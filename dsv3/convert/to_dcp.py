"""direction=hf_to_dcp: a DCP directory that describes itself, with what a way back needs in hf/."""

import shutil
from pathlib import Path
from typing import Any

import torch
import yaml

from dsv3.checkpoint.directory import MODEL_FILE, TOKENIZER_DIR
from dsv3.checkpoint.released.companions import HF_DIR, NOTES, SCALES_FILE, carry, write_json
from dsv3.checkpoint.released.names import SCALE, copies, stored_dtype
from dsv3.checkpoint.released.shard_writer import plan_shards
from dsv3.checkpoint.released.source import ReleasedSource
from dsv3.checkpoint.released.values import read_config
from dsv3.config import plain
from dsv3.convert.dcp_target import dcp_outputs, write_metadata
from dsv3.convert.hf_target import Shard
from dsv3.convert.journal import Finished
from dsv3.convert.pieces import Output
from dsv3.convert.scales import ScaleGrid
from dsv3.convert.work import Work
from dsv3.model.config import ModelConfig


def to_dcp(source: ReleasedSource, model: ModelConfig, dtype: torch.dtype) -> Work:
    """Weights as a DCP in `dtype`, model.yaml, the tokenizer, and hf/ with config, scales and notes."""
    outputs = dcp_outputs(source, dtype)
    weights = len(outputs)
    scales = _scales(source)
    dtypes = {tensor.parameter: stored_dtype(tensor, dtype) for tensor in source.layout}

    def complete(directory: Path, finished: list[Finished]) -> None:
        write_metadata(directory, finished[:weights], source.shapes, dtypes)
        (directory / MODEL_FILE).write_text(yaml.safe_dump(plain(model), sort_keys=False))
        carry(source.directory, directory / HF_DIR)
        write_json(directory / HF_DIR / NOTES, _notes(source, model))
        tokenizer = source.directory / "tokenizer.json"
        if tokenizer.is_file():
            (directory / TOKENIZER_DIR).mkdir(exist_ok=True)
            shutil.copyfile(tokenizer, directory / TOKENIZER_DIR / tokenizer.name)

    return Work(outputs + scales, complete)


def _notes(source: ReleasedSource, model: ModelConfig) -> dict[str, Any]:
    """How the weights were stored: what an export repeats."""
    quantization = read_config(source.directory).values.get("quantization_config")
    stored_twice = all(name in source.stored for name in copies(model))
    return {"block": list(source.block), "quantization_config": quantization, "copies": stored_twice}


def _scales(source: ReleasedSource) -> list[Output]:
    """The scale grids of fp8 weights under the weights' names, in one file of the same format."""
    names = [tensor.name for tensor in source.layout if source.is_quantized(tensor.name)]
    if not names:
        return []
    entries = [(name, torch.float32, source.stored[name + SCALE].shape) for name in names]
    (plan,) = plan_shards(entries, 2**62)
    shard = Shard(plan)
    return [
        Output(f"{HF_DIR}/{SCALES_FILE}", plan.nbytes, [ScaleGrid(shard, source, name) for name in names])
    ]
