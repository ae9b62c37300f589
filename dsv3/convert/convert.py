"""Carry out what convert.py is asked for: open a source, write the files of a target, verify them."""

import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from enum import Enum
from pathlib import Path
from typing import Any

import torch

from dsv3.checkpoint.directory import HF_DIR, MANIFEST_FILE, find_checkpoint
from dsv3.checkpoint.load import open_hf_checkpoint, parameter_shapes
from dsv3.checkpoint.manifest import verify, verify_description
from dsv3.config.convert import AUTO, ConvertConfig, Direction, StoredType
from dsv3.config.model import ModelConfig
from dsv3.config.strict import to_yaml
from dsv3.convert.dcp_source import DcpSource
from dsv3.convert.dcp_target import to_dcp
from dsv3.convert.destination import Destination
from dsv3.convert.download import download
from dsv3.convert.engine import Conversion, ConversionEngine
from dsv3.convert.estimate import estimate, estimated_bytes
from dsv3.convert.hf_assets import SCALES_FILE
from dsv3.convert.hf_target import require_valid_scales, to_hf
from dsv3.convert.output_file import Interrupted, row_slices
from dsv3.convert.request import is_verify_only
from dsv3.distributed.signals import NOTHING_TO_SAVE, Stopped, stop_on_signal
from dsv3.errors import RunFailed
from dsv3.hf.names import SCALE_SUFFIX, mtp_duplicates
from dsv3.hf.pread_file import DirectReader
from dsv3.hf.storage_reader import HFSource
from dsv3.metrics.progress import amount, phase


def require_equal_mtp_duplicates(source: HFSource, model: ModelConfig, workers: int) -> None:
    """Raise UserError for a duplicate that differs from its original.

    Here the two are one tensor, and the difference would be lost.
    """
    pairs = [(name, original) for name, original in mtp_duplicates(model).items() if name in source.stored]
    with phase("comparing what MTP layers share"), ThreadPoolExecutor(workers) as pool:
        for (name, original), equal in zip(
            pairs, pool.map(lambda pair: _equal_bytes(source, *pair), pairs), strict=True
        ):
            if not equal:
                raise source.unequal_duplicate(name, original)


def _equal_bytes(source: HFSource, name: str, other: str) -> bool:
    """Return whether two tensors are stored as the same bytes, in fp8 their scales as well."""
    one, two = source.stored[name], source.stored[other]
    if (one.shape, one.dtype) != (two.shape, two.dtype):
        return False
    slices = row_slices(one.shape, one.dtype.itemsize)
    if source.is_quantized(name):
        scales = (name + SCALE_SUFFIX, other + SCALE_SUFFIX)
        if scales[0] not in source.stored or not _equal_bytes(source, *scales):
            return False
    return all(
        torch.equal(source.read_bytes(name, *rows), source.read_bytes(other, *rows)) for rows in slices
    )


def convert(config: ConvertConfig) -> str:
    """Carry out a conversion; return its summary."""
    if config.direction is Direction.download:
        return str(download(config))
    torch.set_num_threads(1)  # each worker computes for itself
    output = Path(config.output or "")
    if is_verify_only(config):
        return verify_output(output)
    model, directory = config.model, Path(config.input or "")
    assert model is not None
    workers = (os.cpu_count() or 1) if config.workers == AUTO else int(config.workers)
    if config.plan and not config.input:
        return estimate(*estimated_bytes(config, model, parameter_shapes(model)), workers, config.speeds)
    with phase("planning the files to write"):
        source = open_source(config.direction, directory, model, whole=config.verify and not config.plan)
        if config.direction is Direction.hf_to_dcp:
            assert isinstance(source, HFSource)
            dtype = torch.float32 if config.dtype is StoredType.fp32 else torch.bfloat16
            conversion = to_dcp(source, model, dtype)
        else:
            conversion = to_hf(config, source, model)
    for warning in conversion.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    if config.plan:
        read = sum(file.stat().st_size for file in _input_files(source))
        return estimate(read, conversion.nbytes, workers, config.speeds)
    if isinstance(source, HFSource):
        require_valid_scales(source, workers)
        require_equal_mtp_duplicates(source, model, workers)
    started = time.monotonic()
    with Destination(output, _identity(config, source, model, conversion)) as destination:
        _carry_out(destination, conversion, workers)
    seconds = time.monotonic() - started
    gigabytes = conversion.nbytes / 1e9
    rate = gigabytes / max(seconds, 1e-9)
    summary = f"{output}: {gigabytes:.2f} GB in {seconds:.1f} s ({rate:.2f} GB/s)"
    written = amount(len(conversion.files), "files")
    summary += f"\n{count_tensors(source, model)}; {written} of weights written in {config.dtype.value}"
    return f"{summary}\n{verify_output(output)}" if config.verify else summary


def count_tensors(source: HFSource | DcpSource, model: ModelConfig) -> str:
    """Return the counts of what a conversion reads and of what it leaves out."""
    files = amount(len(_input_files(source)), "files")
    told = [f"{amount(len(source.layout), 'tensors')} read from {files}"]
    if isinstance(source, HFSource):
        duplicates = [name for name in mtp_duplicates(model) if name in source.stored]
        taken = {tensor.name for tensor in source.layout}.union(duplicates)
        stored = {name.removesuffix(SCALE_SUFFIX) for name in source.stored}
        scales = sum(name.endswith(SCALE_SUFFIX) for name in source.stored)
        told += [f"{amount(scales, 'scale grids')} with them"] if scales else []
        if duplicates:
            told.append(f"{amount(len(duplicates), 'duplicates')} of MTP layers, equal to their originals")
        if left_out := len(stored - taken):
            told.append(f"{amount(left_out, 'tensors')} left out, which the model does not have")
    return ", ".join(told)


def open_source(
    direction: Direction, directory: Path, model: ModelConfig, whole: bool
) -> HFSource | DcpSource:
    """Open the input of a conversion; a DCP is compared with its manifest, its tensors only if `whole`."""
    if direction is Direction.dcp_to_hf:
        checkpoint = find_checkpoint(str(directory))
        (verify if whole else verify_description)(checkpoint)
        return DcpSource(checkpoint, model, parameter_shapes(model))
    return open_hf_checkpoint(directory, model, DirectReader)


def _carry_out(destination: Destination, conversion: Conversion, workers: int) -> None:
    """Write all files; raise Stopped where a signal asks to stop, RunFailed for an error of the disk."""
    try:
        destination.require_space(conversion.nbytes)
        with (
            stop_on_signal(save_message=NOTHING_TO_SAVE) as request,
            phase(f"writing {destination.output.name}", conversion.nbytes) as work,
        ):
            engine = ConversionEngine(
                destination.partial, destination.journal, workers, work.advance, lambda: request.requested
            )
            finished = engine.run(conversion.files)
            conversion.complete(destination.partial, finished)
            destination.complete(finished)
    except Interrupted:
        raise Stopped(f"stopped: {destination.remains}") from None
    except OSError as error:
        where = f" at {error.filename}" if error.filename else ""
        raise RunFailed(f"{error.strerror or error}{where}: {destination.remains}") from None


def _input_files(source: HFSource | DcpSource) -> list[Path]:
    """Return the files that a conversion reads."""
    if isinstance(source, HFSource):
        return sorted({entry.file for entry in source.stored.values()})
    beside = [source.directory / ".metadata", source.directory / HF_DIR / SCALES_FILE]
    return [*sorted(source.directory.glob("*.distcp")), *(path for path in beside if path.is_file())]


def _identity(
    config: ConvertConfig, source: HFSource | DcpSource, model: ModelConfig, conversion: Conversion
) -> dict[str, Any]:
    """Return the settings and inputs that identify a conversion.

    After a kill only an equal conversion goes on with it.
    """
    files = [
        [os.path.abspath(path), path.stat().st_size, path.stat().st_mtime_ns]  # noqa: PTH100 (keeps links)
        for path in _input_files(source)
    ]
    keys = ("direction", "dtype", "scale_fmt", "max_shard_size")
    chosen = {key: value.value if isinstance(value := getattr(config, key), Enum) else value for key in keys}
    if config.dtype is StoredType.fp8:
        chosen["fp8.unaligned"] = config.fp8.unaligned.value
    stored = {"quantization_config": [source.block, source.quantization], "model": to_yaml(model)}
    layout = [[file.name, file.nbytes, len(file.slices)] for file in conversion.files]
    return chosen | {"input": files} | stored | {"layout of files": layout}


def verify_output(output: Path) -> str:
    """Read a finished output again; UserError unless every file is as its manifest says."""
    verify(output)
    return f"{output}: every file is as {MANIFEST_FILE} says"
