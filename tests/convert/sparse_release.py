"""Write an FP8 checkpoint with the names, shapes and files of a release; its weights are holes in the files.

A hole takes no disk space and reads as zeros. Scales cannot be holes, because a scale of 0 is refused or has
its block read: they are written, 2^-10 each, which is 164 MB of the 690 GB of 671b.
"""

import json
import math
from pathlib import Path

import numpy as np
import torch

from dsv3.checkpoint.load import parameter_shapes
from dsv3.config.model import ModelConfig
from dsv3.fp8.quantize import BLOCK
from dsv3.hf.config_writer import config_json
from dsv3.hf.names import SCALE_SUFFIX, hf_layout, is_fp8_weight, stored_dtype, with_mtp_duplicates
from dsv3.hf.safetensors_header import DTYPE_NAMES

FILE_BYTES = 4_300_000_000
"""Data per file, as in DeepSeek's releases: 671b then has some 163 files."""


def write_sparse_release(directory: Path, model: ModelConfig, file_bytes: int = FILE_BYTES) -> None:
    """Write config.json, index and files of `model` to `directory`."""
    directory.mkdir(parents=True, exist_ok=True)
    config = config_json(model, "bfloat16")
    style = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic"}
    config["quantization_config"] = style | {"weight_block_size": [BLOCK, BLOCK]}
    (directory / "config.json").write_text(json.dumps(config))
    files: list[list[tuple[str, torch.dtype, tuple[int, ...]]]] = [[]]
    held = 0
    for name, tensor in with_mtp_duplicates(hf_layout(model, parameter_shapes(model)), model):
        if held > file_bytes:
            files.append([])
            held = 0
        in_fp8 = is_fp8_weight(name)
        dtype = torch.float8_e4m3fn if in_fp8 else stored_dtype(tensor, torch.bfloat16)
        files[-1].append((name, dtype, tensor.shape))
        if in_fp8:
            grid = tuple(-(-length // BLOCK) for length in tensor.shape)
            files[-1].append((name + SCALE_SUFFIX, torch.float32, grid))
        held += math.prod(tensor.shape) * dtype.itemsize
    where: dict[str, str] = {}
    for number, entries in enumerate(files, 1):
        file = f"model-{number:05d}-of-{len(files):06d}.safetensors"
        _write(directory / file, entries)
        where |= {name: file for name, *_ in entries}
    index = {"metadata": {}, "weight_map": where}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def _write(path: Path, entries: list[tuple[str, torch.dtype, tuple[int, ...]]]) -> None:
    """Write one file: its header, its scales, and holes for everything else."""
    header, end, scales = {}, 0, []
    for name, dtype, shape in entries:
        nbytes = math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": DTYPE_NAMES[dtype], "shape": shape, "data_offsets": (end, end + nbytes)}
        if name.endswith(SCALE_SUFFIX):
            scales.append((end, math.prod(shape)))
        end += nbytes
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        data = file.tell()
        for begin, count in scales:
            file.seek(data + begin)
            file.write(np.full(count, 2.0**-10, dtype="<f4").tobytes())
        file.truncate(data + end)
