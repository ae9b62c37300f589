"""A live model and released weights: what files hold, and a model's weights as they would be released.

A released checkpoint of a live model, written while it trains.
"""

import json
import math
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from dsv3.checkpoint.directory import commit, prepare_partial
from dsv3.checkpoint.load import open_released, parameter_shapes
from dsv3.checkpoint.manifest import FileEntry, write_manifest
from dsv3.config.model import ModelConfig
from dsv3.convert.dcp_source import inside, overlap
from dsv3.distributed.process_group import RankContext
from dsv3.hf.config_json import config_json
from dsv3.hf.names import HFTensor, mtp_duplicates, released_layout, stored_dtype
from dsv3.hf.safetensors_header import byte_view
from dsv3.hf.safetensors_reader import INDEX, open_shards
from dsv3.hf.safetensors_writer import ShardPlan, ShardWriter, index_json, plan_shards
from dsv3.parallel.parallel_model import ParallelModel

_ROWS = 1024


def has_layer(directory: Path, number: int) -> bool:
    """Whether a released checkpoint stores anything of `model.layers.NUMBER`."""
    return any(name.startswith(f"model.layers.{number}.") for name in open_shards(directory))


def released_norms(config: ModelConfig, directory: Path) -> dict[str, float]:
    """The norms of a checkpoint's weights by our names, read a few rows at a time.

    UserError as of HFSource; a tensor with numbers that are not finite has no finite norm.
    """
    squares: dict[str, float] = {}
    with closing(open_released(directory, config)) as source:
        for tensor in source.layout:
            rows = tensor.shape[0] if tensor.shape else 1
            for first in range(0, rows, _ROWS):
                out = torch.empty(min(_ROWS, rows - first), *tensor.shape[1:])
                norm = float(source.rows(tensor, first, out.shape[0], out).norm())
                squares[tensor.parameter] = squares.get(tensor.parameter, 0.0) + norm**2
    return {name: math.sqrt(square) for name, square in squares.items()}


def streamed(config: ModelConfig) -> list[tuple[str, HFTensor]]:
    """What `stream` yields, in its order: names, and which part of which parameter each is."""
    tensors = {tensor.name: tensor for tensor in released_layout(config, parameter_shapes(config))}
    return [*tensors.items(), *((copy, tensors[name]) for copy, name in mtp_duplicates(config).items())]


@torch.no_grad()
def stream(model: ParallelModel, dtype: torch.dtype = torch.bfloat16) -> Iterator[tuple[str, Tensor]]:
    """Yield (released name, whole tensor in `dtype`) of a live model on any layout, layer by layer.

    All ranks iterate together, to the end, and all get the tensors, on the model's device. Memory is one
    released tensor (of a stack of experts one expert's matrix). Selection biases stay fp32.
    """
    here = model.named_tensors()
    for name, tensor in streamed(model.parts[0].config):
        whole = torch.zeros(tensor.shape, dtype=stored_dtype(tensor, dtype), device=model.device)
        if tensor.parameter in here:
            _copy_here(here[tensor.parameter], tensor, whole)
        if model.mesh is not None:
            # Ranks that have the same part have the same bytes, the others zeros: the largest byte is
            # exact, where a sum would turn -0 into 0 and count replicas twice.
            dist.all_reduce(byte_view(whole), dist.ReduceOp.MAX, group=model.mesh.world)
        yield name, whole


def _copy_here(parameter: Tensor, tensor: HFTensor, whole: Tensor) -> None:
    """Copy what this rank's shard of a parameter has of a released tensor to its place."""
    offset = tuple(0 for _ in parameter.shape)
    local = parameter
    if isinstance(parameter, DTensor):
        local = parameter.to_local()
        _, offset = compute_local_shape_and_global_offset(
            parameter.shape, parameter.device_mesh, parameter.placements
        )
    if not local.numel():
        return
    shared = overlap(tensor.offset, tensor.sizes, offset, local.shape)
    if shared is not None:
        whole.view(tensor.sizes)[inside(*shared, tensor.offset)].copy_(local[inside(*shared, offset)])


_LARGEST_FILE = 5 * 10**9

_TOKENIZER_CONFIG = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}


def export_hf(model: ParallelModel, directory: Path, tokenizer: Path, ranks: RankContext) -> None:
    """Write bf16 safetensors, config.json and the tokenizer to `directory`, which appears when whole.

    All ranks call it together; rank 0 writes. UserError for a model that no released class computes.
    """
    config = model.parts[0].config
    values = config_json(config, "bfloat16")
    if not ranks.is_main:
        for _ in stream(model):
            pass
        return
    partial = prepare_partial(directory)
    plans = plan_shards(
        [(name, stored_dtype(tensor, torch.bfloat16), tensor.shape) for name, tensor in streamed(config)],
        _LARGEST_FILE,
    )
    _write(model, plans, partial)
    if len(plans) > 1:
        (partial / INDEX).write_text(index_json(plans))
    (partial / "config.json").write_text(json.dumps(values, indent=2) + "\n")
    copy_tokenizer(tokenizer, partial)
    write_manifest(partial, {path.name: FileEntry.of(path) for path in sorted(partial.iterdir())})
    commit(partial, directory)


def copy_tokenizer(stored: Path, directory: Path) -> None:
    """Put a tokenizer trained here, if there is one, where transformers looks for it."""
    file = stored / "tokenizer.json"
    if file.is_file() and not (directory / file.name).exists():
        shutil.copyfile(file, directory / file.name)
        (directory / "tokenizer_config.json").write_text(json.dumps(_TOKENIZER_CONFIG, indent=2) + "\n")


def _write(model: ParallelModel, plans: list[ShardPlan], directory: Path) -> None:
    """Append what is streamed to one file after another."""
    waiting = iter(plans)
    with ExitStack() as stack:
        writer, left = None, set[str]()
        for name, tensor in stream(model):
            if not left:
                stack.close()
                plan = next(waiting)
                file = stack.enter_context((directory / plan.name).open("wb"))
                writer = stack.enter_context(ShardWriter(plan, file))
                left = {entry.name for entry in plan.tensors}
            assert writer is not None
            writer.write(name, tensor)
            left.remove(name)
