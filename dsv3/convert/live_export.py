"""Export a live model as an HF checkpoint, and read facts of HF checkpoints for `task=verify`."""

import math
from collections.abc import Iterator
from contextlib import closing
from itertools import islice
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from dsv3.checkpoint.directory import ASSETS_DIR, TOKENIZER_DIR, commit, prepare_partial
from dsv3.checkpoint.load import open_hf_checkpoint, parameter_shapes
from dsv3.checkpoint.manifest import FileEntry, write_manifest
from dsv3.checkpoint.training_record import TrainingRecord
from dsv3.config.model import ModelConfig
from dsv3.convert.dcp_source import intersect, relative_index
from dsv3.convert.hf_assets import ExportAssets
from dsv3.distributed.process_group import RankContext
from dsv3.distributed.torch_private import local_shape_and_offset
from dsv3.hf.names import HFTensor, hf_layout, stored_dtype, with_mtp_duplicates
from dsv3.hf.safetensors_header import byte_view
from dsv3.hf.safetensors_reader import INDEX, read_headers
from dsv3.hf.safetensors_writer import SafetensorsWriter, index_json, plan_files
from dsv3.metrics.progress import phase
from dsv3.parallel.parallel_model import ParallelModel

_ROWS = 1024


def has_layer(directory: Path, number: int) -> bool:
    """Return whether an HF checkpoint stores anything of `model.layers.NUMBER`."""
    return any(name.startswith(f"model.layers.{number}.") for name in read_headers(directory))


def hf_weight_norms(config: ModelConfig, directory: Path) -> dict[str, float]:
    """Return the norms of a checkpoint's weights by our names, read a few rows at a time.

    UserError as of HFSource. A tensor with nonfinite values has a nonfinite norm.
    """
    squares: dict[str, float] = {}
    with (
        closing(open_hf_checkpoint(directory, config)) as source,
        phase("computing the norm of every weight", len(source.layout), "tensors") as work,
    ):
        for tensor in source.layout:
            work.advance()
            rows = tensor.shape[0] if tensor.shape else 1
            for first in range(0, rows, _ROWS):
                out = torch.empty(min(_ROWS, rows - first), *tensor.shape[1:])
                norm = float(source.read_rows(tensor, first, out.shape[0], out).norm())
                squares[tensor.parameter] = squares.get(tensor.parameter, 0.0) + norm**2
    return {name: math.sqrt(square) for name, square in squares.items()}


def exported_tensors(config: ModelConfig) -> list[tuple[str, HFTensor]]:
    """Return the HF names that `stream` yields, in its order, each with its box of a parameter."""
    return with_mtp_duplicates(hf_layout(config, parameter_shapes(config)), config)


@torch.no_grad()
def stream(model: ParallelModel, dtype: torch.dtype = torch.bfloat16) -> Iterator[tuple[str, Tensor]]:
    """Yield (HF name, whole tensor in `dtype`) of a live model on any layout, layer by layer.

    All ranks iterate together, to the end, and all get the tensors, on the model's device. Memory is one
    HF tensor (one expert's matrix of a stack of experts). Expert biases stay fp32.
    """
    local_state = model.state_dict()
    for name, tensor in exported_tensors(model.model_parts[0].config):
        whole = torch.zeros(tensor.shape, dtype=stored_dtype(tensor, dtype), device=model.device)
        if tensor.parameter in local_state:
            _copy_local_shard(local_state[tensor.parameter], tensor, whole)
        if model.mesh is not None:
            # Ranks that have the same part have the same bytes, the others zeros: the largest byte is
            # exact, where a sum would turn -0 into 0 and count replicas twice.
            dist.all_reduce(byte_view(whole), dist.ReduceOp.MAX, group=model.mesh.world)
        yield name, whole


def _copy_local_shard(parameter: Tensor, tensor: HFTensor, whole: Tensor) -> None:
    """Copy the part of an HF tensor that this rank's shard of a parameter holds to its place in `whole`."""
    offset = tuple(0 for _ in parameter.shape)
    local = parameter
    if isinstance(parameter, DTensor):
        local = parameter.to_local()
        _, offset = local_shape_and_offset(parameter)
    if not local.numel():
        return
    shared = intersect(tensor.offset, tensor.sizes, offset, local.shape)
    if shared is not None:
        target = whole.view(tensor.sizes)[relative_index(*shared, tensor.offset)]
        target.copy_(local[relative_index(*shared, offset)])


_LARGEST_FILE = 5 * 10**9


def export_hf(
    model: ParallelModel,
    directory: Path,
    run_dir: Path,
    ranks: RankContext,
    record: TrainingRecord | None = None,
    step: int = 0,
) -> None:
    """Write bf16 safetensors and all that belongs beside them to `directory`, which appears when complete.

    The assets are those that the run's weights came with, else the run's own tokenizer, both from `run_dir`.
    `record` says what the weights of `step` were trained on. All ranks call it together; rank 0 writes.
    UserError for a model that no class of transformers computes.
    """
    config = model.model_parts[0].config
    assets = ExportAssets.of(config, "bfloat16", run_dir / ASSETS_DIR, run_dir / TOKENIZER_DIR)
    if not ranks.is_main:
        for _ in stream(model):
            pass
        return
    partial = prepare_partial(directory)
    bf16 = torch.bfloat16
    entries = [(name, stored_dtype(tensor, bf16), tensor.shape) for name, tensor in exported_tensors(config)]
    plans = plan_files(entries, _LARGEST_FILE)
    weights = stream(model, bf16)
    with phase(f"exporting {directory}", sum(plan.nbytes for plan in plans)) as work:
        for plan in plans:  # in the order of the stream
            with (partial / plan.name).open("wb") as file, SafetensorsWriter(plan, file) as writer:
                for name, tensor in islice(weights, len(plan.tensors)):
                    writer.write(name, tensor)
                    work.advance(tensor.nbytes)
    if len(plans) > 1:
        (partial / INDEX).write_text(index_json(plans))
    assets.write(partial)
    if record is not None:
        record.write(partial, step)
    with phase(f"computing digests of {directory}"):
        files = sorted(path for path in partial.rglob("*") if path.is_file())
        write_manifest(partial, {str(path.relative_to(partial)): FileEntry.of(path) for path in files})
    commit(partial, directory)
