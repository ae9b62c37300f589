"""Worker side: export a live model from every rank, and let exports fail on one of them."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor

from dsv3.checkpoint import state
from dsv3.config.convert import StoredType
from dsv3.config.root import Config
from dsv3.convert import live_export, output_file, shard_exchange
from dsv3.convert.live_export import LiveExporter, stream
from dsv3.distributed.signals import StopEarly
from dsv3.errors import RunFailed
from dsv3.planning.layout import ParallelDims
from tests.parallel.tiny_training import prepared

LARGEST_FILE = 14_000
"""Bytes of a file: the tiny model has more than one per rank, so that there are several rounds."""

SLICE = 2_048
"""Bytes of a slice: most tensors of the tiny model have several."""


@dataclass
class Traffic:
    """What a rank does for one export."""

    sent: int = 0
    received: int = 0
    waiting: int = 0
    """Bytes of messages that are on their way."""
    most_waiting: int = 0
    wrote: tuple[str, ...] = ()


def export(
    config: Config, degrees: ParallelDims | None, run_dir: Path, folder: Path, types: Iterable[StoredType]
) -> tuple[dict[StoredType, Traffic], list[tuple[str, Tensor]]]:
    """Export in each type to a folder of its name; return what this rank did, and what `stream` gives it."""
    setup = prepared(config, degrees, "sgd")
    assert setup is not None
    model, _, ranks = setup
    done = {}
    for stored in types:
        exporter = LiveExporter(model, run_dir, ranks, stored, LARGEST_FILE)
        with (
            patch.object(output_file, "SLICE_BYTES", SLICE),
            counting(folder / f".partial-{stored.name}") as did,
        ):
            exporter.write(folder / stored.name)
        done[stored] = did
    return done, [(name, tensor.clone()) for name, tensor in stream(model, torch.float32)]


@contextmanager
def counting(folder: Path) -> Iterator[Traffic]:
    """Count the messages of this rank, and note which files it writes below `folder`."""
    traffic, send, receive = Traffic(), dist.isend, dist.irecv

    class Message:
        def __init__(self, work: Any, nbytes: int) -> None:
            self.work, self.nbytes = work, nbytes
            traffic.waiting += nbytes
            traffic.most_waiting = max(traffic.most_waiting, traffic.waiting)

        def wait(self) -> None:
            self.work.wait()
            traffic.waiting -= self.nbytes

    def count_sent(tensor: Tensor, **to: Any) -> Message:
        traffic.sent += tensor.nbytes
        return Message(send(tensor, **to), tensor.nbytes)

    def count_received(tensor: Tensor, **of: Any) -> Message:
        traffic.received += tensor.nbytes
        return Message(receive(tensor, **of), tensor.nbytes)

    writer = output_file.HashingWriter

    def open_file(path: Path, *others: Any) -> output_file.HashingWriter:
        assert path.parent == folder
        traffic.wrote += (path.name,)
        return writer(path, *others)

    with (
        patch.object(dist, "isend", count_sent),
        patch.object(dist, "irecv", count_received),
        patch.object(live_export, "HashingWriter", open_file),
    ):
        yield traffic


FAILING = 3
"""The rank that fails."""


def fail(config: Config, degrees: ParallelDims, run_dir: Path, folder: Path) -> dict[str, str]:
    """Let exports fail on one rank alone; return what this rank raises, and how the last one ends."""
    setup = prepared(config, degrees, "sgd")
    assert setup is not None
    model, _, ranks = setup
    exporter = LiveExporter(model, run_dir, ranks, largest_file=LARGEST_FILE)
    told = {}
    for name, broken in FAULTS.items():
        with patch.object(output_file, "SLICE_BYTES", SLICE), broken(ranks.rank):
            try:
                exporter.write(folder / "step-1")
            except (RunFailed, StopEarly) as error:
                told[name] = f"{type(error).__name__}: {error}"
        ranks.meet()
        told[name] += " and left " + ", ".join(sorted(path.name for path in folder.glob("*")))
        ranks.meet()
    exporter.write(folder / "step-1")
    return told


def _disk_full(rank: int) -> Any:
    write, written = output_file.DirectWriter.write, []

    def full(writer: Any, data: Any) -> None:
        written.append(len(data))
        if rank == FAILING and len(written) > 2:  # in the middle of a file
            raise OSError(28, "No space left on device", "a file of rank 3")
        write(writer, data)

    return patch.object(output_file.DirectWriter, "write", full)


def _no_memory(rank: int) -> Any:
    local = state.local_tensor

    def out_of_memory(tensor: Tensor) -> Tensor:
        if rank == FAILING:
            raise RuntimeError("CUDA out of memory")
        return local(tensor)

    return patch.object(shard_exchange, "local_tensor", out_of_memory)


def _stopped(rank: int) -> Any:
    return patch.object(live_export, "stop_requested", lambda: rank == FAILING)


def _no_directory(rank: int) -> Any:
    def refuse(directory: Path) -> Path:
        raise OSError(30, "Read-only file system", str(directory))

    return patch.object(live_export, "prepare_partial", refuse)


FAULTS = {"disk": _disk_full, "memory": _no_memory, "stop": _stopped, "directory": _no_directory}
