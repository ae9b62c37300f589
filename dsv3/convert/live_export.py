"""Export a live model as an HF checkpoint, and read facts of HF checkpoints for `task=verify`."""

import math
import shutil
from collections.abc import Iterator
from contextlib import closing
from functools import partial
from pathlib import Path
from threading import Event

import torch
import torch.distributed as dist
from torch import Tensor

from dsv3.checkpoint.agreement import on_main, together
from dsv3.checkpoint.directory import commit, partial_directory, prepare_partial
from dsv3.checkpoint.load import open_hf_checkpoint, parameter_shapes
from dsv3.checkpoint.manifest import write_manifest
from dsv3.checkpoint.save import reason
from dsv3.checkpoint.state import local_tensor
from dsv3.checkpoint.training_record import TrainingRecord
from dsv3.config.convert import StoredType
from dsv3.config.model import ModelConfig
from dsv3.convert.dcp_source import intersect, relative_index
from dsv3.convert.export_plan import ExportPlan, ExportSlice
from dsv3.convert.hf_assets import ExportAssets
from dsv3.convert.output_file import HashingWriter
from dsv3.convert.shard_exchange import ShardExchange, local_box
from dsv3.distributed.process_group import RankContext
from dsv3.distributed.signals import StopEarly, stop_requested
from dsv3.errors import RunFailed, UserError
from dsv3.hf.names import HFTensor, hf_layout, stored_dtype, with_mtp_duplicates
from dsv3.hf.nonfinite import require_finite_export
from dsv3.hf.safetensors_header import byte_view
from dsv3.hf.safetensors_reader import INDEX, read_headers
from dsv3.hf.safetensors_writer import index_json
from dsv3.metrics.progress import Phase, phase
from dsv3.parallel.parallel_model import ParallelModel
from dsv3.tokens.file_digests import FileEntry

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
    HF tensor (one expert's matrix of a stack of experts). Expert biases stay fp32. RunFailed, on all ranks,
    for a tensor with values that are not finite in `dtype`.
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
        require_finite_export(whole, whole, name, (0,) * whole.ndim)
        yield name, whole


def _copy_local_shard(parameter: Tensor, tensor: HFTensor, whole: Tensor) -> None:
    """Copy the part of an HF tensor that this rank's shard of a parameter holds to its place in `whole`."""
    box = local_box(parameter)
    shared = intersect(tensor.offset, tensor.sizes, *box)
    if shared is not None:
        target = whole.view(tensor.sizes)[relative_index(*shared, tensor.offset)]
        target.copy_(local_tensor(parameter)[relative_index(*shared, box.offset)])


LARGEST_FILE = 5 * 10**9
"""Bytes of a safetensors file at most, as transformers cuts them."""


class LiveExporter:
    """Writes HF checkpoints of a live model on any layout, each rank its own files; ranks call it together.

    A file is written front to back by one rank, which gets the rows from the ranks that hold them
    (shard_exchange.py). The files are the same ones on every layout. They are dealt out in rounds: a rank
    writes at most ceil(files / ranks) of them, and holds less than 160 MiB of an export in memory.

    The other way, all ranks writing their slices into shared files, saves the transfer of 5 GB per writer.
    But file systems keep the writers of one file apart by locks on stretches of it, NFS clients write whole
    pages, object stores take no write within a file, and digests would need all files to be read again.

    Args:
        run_dir: holds the assets that the run's weights came with, else the run's own tokenizer.
        stored: type of the weights in the files.
        largest_file: bytes of a safetensors file at most.
    """

    def __init__(
        self,
        model: ParallelModel,
        run_dir: Path,
        ranks: RankContext,
        stored: StoredType = StoredType.bf16,
        largest_file: int = LARGEST_FILE,
    ) -> None:
        self.model = model
        self.run_dir = run_dir
        self.ranks = ranks
        self.stored = stored
        self.largest_file = largest_file
        self._prepared: tuple[ExportPlan, ShardExchange] | None = None

    def write(self, directory: Path, record: TrainingRecord | None = None, step: int = 0) -> None:
        """Write safetensors and all that belongs beside them to `directory`, which appears when complete.

        `record` says what the weights of `step` were trained on. UserError for a model that no class of
        transformers computes, RunFailed where a rank cannot write, StopEarly at a signal; all on all ranks.
        """
        folder = partial_directory(directory)
        plan, exchange = self._prepared = self._prepared or self._prepare()
        assets: list[ExportAssets] = []  # of rank 0, which alone reads and writes them

        def begin() -> None:
            assets.append(plan.assets(self.run_dir))
            prepare_partial(directory)

        try:
            on_main(self.ranks, begin)
            entries = self._write_files(plan, exchange, folder, f"exporting {directory}")
            on_main(self.ranks, lambda: _complete(plan, assets[0], entries, directory, record, step))
        except (OSError, RunFailed, StopEarly) as error:
            if self.ranks.is_main:  # on a full disk half an export would be in the way
                shutil.rmtree(folder, ignore_errors=True)
            if isinstance(error, StopEarly):
                raise
            why = error if isinstance(error, RunFailed) else reason(error, folder)
            raise RunFailed(f"the export {directory} cannot be written: {why}") from None

    def _prepare(self) -> tuple[ExportPlan, ShardExchange]:
        """Return what all exports of a run have in common."""
        with phase("planning the export"):
            config = self.model.model_parts[0].config
            plan = ExportPlan.of(config, self.stored, self.run_dir, self.largest_file)
            return plan, ShardExchange(self.model.state_dict(), plan.shapes, self.ranks)

    def _write_files(
        self, plan: ExportPlan, exchange: ShardExchange, folder: Path, title: str
    ) -> dict[str, FileEntry]:
        """Write the files of all ranks; return their entries by name. Raises what any rank met in a round."""
        entries: dict[str, FileEntry] = {}
        if self.ranks.world > 1:
            title += f": this rank's share of {sum(file.nbytes for file in plan.files) / 1e9:,.1f} GB"
        with phase(title, 0) as work:
            for writers in plan.rounds(self.ranks.world):
                if self.ranks.meet(stop_requested()):
                    raise StopEarly
                slices = plan.slices(writers, exchange)
                work.total = (work.total or 0) + sum(each.nbytes for each in slices)
                wrote = partial(self._write_round, plan, exchange, slices, folder, work)
                for found in together(self.ranks, wrote):
                    entries |= found
        return entries

    def _write_round(
        self, plan: ExportPlan, exchange: ShardExchange, slices: list[ExportSlice], folder: Path, work: Phase
    ) -> dict[str, FileEntry]:
        """Write this rank's file of a round, if it has one, and send rows of others'; return its entry.

        Raises this rank's error after the last slice: others wait for its rows, or for it to take theirs.
        """
        error: Exception | None = None
        file: HashingWriter | None = None
        transfers = (each.transfer for each in slices)
        for each, (_, rows) in zip(slices, exchange.run(transfers, self.model.state_dict()), strict=True):
            work.advance(each.nbytes)
            if rows is None or error is not None:
                continue
            plan.source.rows = rows
            try:
                file = file or HashingWriter(folder / each.output.plan.name, lambda _: None, Event())
                each.write(file)
            except Exception as problem:
                error = RunFailed(str(problem)) if isinstance(problem, UserError) else problem
                if file is not None:
                    file.discard()
        error = error or exchange.error
        if error is not None:
            raise error
        if file is None:
            return {}
        return {file.path.name: FileEntry(file.position, file.finish())}


def _complete(
    plan: ExportPlan,
    assets: ExportAssets,
    entries: dict[str, FileEntry],
    directory: Path,
    record: TrainingRecord | None,
    step: int,
) -> None:
    """Add what belongs beside the weights of an export, and give it its name."""
    folder = partial_directory(directory)
    if len(plan.files) > 1:
        (folder / INDEX).write_text(index_json(plan.files))
    assets.write(folder)
    if record is not None:
        record.write(folder, step)
    small = {str(path.relative_to(folder)): path for path in folder.rglob("*") if path.is_file()}
    added = {name: FileEntry.of(path) for name, path in small.items() if name not in entries}
    write_manifest(folder, entries | added)
    commit(folder, directory, synced=entries)
