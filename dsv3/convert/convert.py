"""The copies of embedding and head that MTP layers are released with: shared here, so they must be equal.

How far a conversion is: bytes, rate and the time it will take, on a terminal.

convert.py's work: a source, a target and what carries slices from one to the other.
"""

import os
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from dsv3.checkpoint.directory import MANIFEST_FILE, find_checkpoint
from dsv3.checkpoint.load import open_released, parameter_shapes
from dsv3.checkpoint.manifest import verify, verify_description
from dsv3.config.convert import AUTO, ConvertConfig, Direction, StoredType
from dsv3.config.model import ModelConfig
from dsv3.config.strict import to_yaml
from dsv3.convert.dcp_source import DcpSource
from dsv3.convert.dcp_target import to_dcp
from dsv3.convert.destination import Destination
from dsv3.convert.download import download
from dsv3.convert.engine import Engine, Work
from dsv3.convert.estimate import estimate, foreseen
from dsv3.convert.hf_assets import HF_DIR, SCALES_FILE
from dsv3.convert.hf_target import require_sound_scales, to_hf
from dsv3.convert.output_file import Interrupted, row_slices
from dsv3.convert.request import only_verifies
from dsv3.distributed.signals import Stopped, stop_on_signal
from dsv3.errors import RunFailed
from dsv3.hf.names import SCALE, mtp_duplicates
from dsv3.hf.pread_file import DirectReader, fault, quoted
from dsv3.hf.storage_reader import HFSource


def require_equal_mtp_duplicates(source: HFSource, model: ModelConfig, workers: int) -> None:
    """UserError for a copy that differs from what it is a copy of: it would be lost without a word."""
    pairs = [(copy, name) for copy, name in mtp_duplicates(model).items() if copy in source.stored]
    with ThreadPoolExecutor(workers) as pool:
        for (copy, name), equal in zip(
            pairs, pool.map(lambda pair: _equal(source, *pair), pairs), strict=True
        ):
            if not equal:
                raise fault(
                    source.stored[copy].file,
                    f"has {quoted(copy)} that is not equal to '{name}': here an MTP layer shares it",
                )


def _equal(source: HFSource, copy: str, name: str) -> bool:
    one, other = source.stored[copy], source.stored[name]
    if (one.shape, one.dtype) != (other.shape, other.dtype):
        return False
    slices = row_slices(one.shape, one.dtype.itemsize)
    scales = [(copy + SCALE, name + SCALE)] if source.is_quantized(copy) else []
    if not all(pair[0] in source.stored and _equal(source, *pair) for pair in scales):
        return False
    return all(torch.equal(source.raw(copy, *rows), source.raw(name, *rows)) for rows in slices)


@contextmanager
def progress(total: int, what: str) -> Iterator[Callable[[int], None]]:
    """A bar of `total` bytes on stderr while the context lasts; what it yields is told of bytes done."""
    console = Console(file=sys.stderr)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task(what, total=total)
        yield lambda count: bar.advance(task, count)


def convert(config: ConvertConfig) -> str:
    """Carry out a conversion; what there is to say of it."""
    if config.direction is Direction.download:
        return str(download(config))
    torch.set_num_threads(1)  # each worker computes for itself
    output = Path(config.output or "")
    if only_verifies(config):
        return _verified(output)
    model, directory = config.model, Path(config.input or "")
    assert model is not None
    workers = (os.cpu_count() or 1) if config.workers == AUTO else int(config.workers)
    if config.plan and not config.input:
        return estimate(*foreseen(config, model, parameter_shapes(model)), workers, config.speeds)
    source = open_source(config.direction, directory, model, whole=config.verify and not config.plan)
    work = _work(config, source, model)
    if config.plan:
        return estimate(_size(_files(source)), work.nbytes, workers, config.speeds)
    if isinstance(source, HFSource):
        require_sound_scales(source, workers)
        require_equal_mtp_duplicates(source, model, workers)
    started = time.monotonic()
    with Destination(output, _identity(config, source, model, work)) as destination:
        _carry_out(destination, work, workers)
    seconds = time.monotonic() - started
    rate = work.nbytes / 1e9 / max(seconds, 1e-9)
    told = f"{output}: {work.nbytes / 1e9:.2f} GB in {seconds:.1f} s ({rate:.2f} GB/s)"
    return f"{told}\n{_verified(output)}" if config.verify else told


def open_source(
    direction: Direction, directory: Path, model: ModelConfig, whole: bool
) -> HFSource | DcpSource:
    """What a conversion reads; a DCP is compared with its manifest, its tensors too where `whole` asks."""
    if direction is Direction.dcp_to_hf:
        checkpoint = find_checkpoint(str(directory))
        (verify if whole else verify_description)(checkpoint)
        return DcpSource(checkpoint, model, parameter_shapes(model))
    return open_released(directory, model, DirectReader)


def _work(config: ConvertConfig, source: HFSource | DcpSource, model: ModelConfig) -> Work:
    if config.direction is Direction.hf_to_dcp:
        assert isinstance(source, HFSource)
        return to_dcp(source, model, torch.float32 if config.dtype is StoredType.fp32 else torch.bfloat16)
    return to_hf(config, source, model)


def _carry_out(destination: Destination, work: Work, workers: int) -> None:
    """Write everything; Stopped where a signal asks for it, RunFailed where the disk does not play along."""
    try:
        destination.require_space(work.nbytes)
        with (
            stop_on_signal(alone=True) as request,
            progress(work.nbytes, f"writing {destination.output.name}") as report,
        ):
            engine = Engine(
                destination.partial, destination.journal, workers, report, lambda: request.requested
            )
            finished = engine.run(work.outputs)
            work.complete(destination.partial, finished)
            destination.complete(finished)
    except Interrupted:
        raise Stopped(f"stopped: {destination.remains}") from None
    except OSError as error:
        where = f" at {error.filename}" if error.filename else ""
        raise RunFailed(f"{error.strerror or error}{where}: {destination.remains}") from None


def _files(source: HFSource | DcpSource) -> list[Path]:
    """The files that are read."""
    if isinstance(source, HFSource):
        return sorted({entry.file for entry in source.stored.values()})
    beside = [source.directory / ".metadata", source.directory / HF_DIR / SCALES_FILE]
    return [*sorted(source.directory.glob("*.distcp")), *(path for path in beside if path.is_file())]


def _size(files: list[Path]) -> int:
    return sum(file.stat().st_size for file in files)


def _identity(
    config: ConvertConfig, source: HFSource | DcpSource, model: ModelConfig, work: Work
) -> dict[str, Any]:
    """What makes two conversions the same one: only then does the second go on with the first."""
    files = [
        [os.path.abspath(path), path.stat().st_size, path.stat().st_mtime_ns]  # noqa: PTH100 (keeps links)
        for path in _files(source)
    ]
    keys = ("direction", "dtype", "scale_fmt", "max_shard_size")
    chosen = {key: value.value if isinstance(value := getattr(config, key), Enum) else value for key in keys}
    stored = {"quantization_config": [source.block, source.quantization], "model": to_yaml(model)}
    layout = [[output.name, output.nbytes, len(output.pieces)] for output in work.outputs]
    return chosen | {"input": files} | stored | {"layout of files": layout}


def _verified(output: Path) -> str:
    verify(output)
    return f"{output}: every file is as {MANIFEST_FILE} says"
