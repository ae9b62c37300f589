"""A rank that cannot go on in an export takes part in every slice of the round, and raises after the last.

Others wait for its rows, or for it to take theirs: by gloo a sender waits until its message is received.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from dsv3.checkpoint.state import local_tensor
from dsv3.convert import shard_exchange
from dsv3.convert.live_export import LiveExporter
from dsv3.convert.shard_exchange import AHEAD, RowTransfer, ShardExchange
from dsv3.hf.names import HFTensor
from tests.harness.trained import ALONE

FULL = OSError(28, "No space left on device", "a file")
SLICES = 5


class Exchange:
    """Gives rows of every slice, and notes how far its caller has come."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error = error
        self.finished: list[int] = []

    def run(self, transfers: Iterator[int], state: object) -> Iterator[tuple[int, torch.Tensor]]:
        for transfer in transfers:
            yield transfer, torch.ones(2)
            self.finished.append(transfer)


class Slice:
    """A slice whose writing fails where it is the one to fail."""

    nbytes = 8
    output = SimpleNamespace(plan=SimpleNamespace(name="model.safetensors"))

    def __init__(self, transfer: int, fails: bool) -> None:
        self.transfer, self.fails = transfer, fails

    def write(self, file: Any) -> None:
        if self.fails:
            raise FULL
        file.write(b"12345678")


def write_round(folder: Path, exchange: Exchange, failing: int) -> tuple[Any, list[int]]:
    """Write a round whose slice `failing` fails; return its entries and the bytes counted as done."""
    model = SimpleNamespace(state_dict=dict)
    exporter = LiveExporter(cast(Any, model), folder, ALONE)
    plan, counted = SimpleNamespace(source=SimpleNamespace()), list[int]()
    work = SimpleNamespace(advance=counted.append)
    slices = [Slice(number, number == failing) for number in range(SLICES)]
    written = exporter._write_round(*cast(Any, (plan, exchange, slices, folder, work)))
    return written, counted


def test_a_round_that_all_can_write_has_its_file(tmp_path: Path) -> None:
    exchange = Exchange()
    written, counted = write_round(tmp_path, exchange, failing=-1)
    assert exchange.finished == list(range(SLICES))
    assert sum(counted) == written["model.safetensors"].size == 8 * SLICES


@pytest.mark.parametrize("failing", [0, 2, SLICES - 1])
def test_a_writer_that_fails_takes_the_rest_of_the_rows_before_it_raises(
    tmp_path: Path, failing: int
) -> None:
    exchange = Exchange()
    with pytest.raises(OSError, match="No space left") as caught:
        write_round(tmp_path, exchange, failing)
    assert caught.value is FULL
    assert exchange.finished == list(range(SLICES))


def test_a_rank_that_cannot_read_its_rows_raises_after_the_last_slice(tmp_path: Path) -> None:
    exchange = Exchange(error=RuntimeError("CUDA out of memory"))
    with pytest.raises(RuntimeError, match="CUDA out of memory"):
        write_round(tmp_path, exchange, failing=-1)
    assert exchange.finished == list(range(SLICES))


def test_rows_that_cannot_be_read_travel_as_zeros(monkeypatch: pytest.MonkeyPatch) -> None:
    """The slices behind a failed one still have their rows, of which the writer makes no file."""
    state = {"weight": torch.arange(24.0).view(8, 3)}
    exchange = ShardExchange(state, {"weight": (8, 3)}, replace(ALONE))
    tensor = HFTensor("weight", (8, 3), "weight", (0, 0), (8, 3))
    transfers = [RowTransfer((n, 0), 0, tensor, n, 1, torch.float32) for n in range(2 * AHEAD + 2)]
    read = list[int]()

    def fail_later(parameter: torch.Tensor) -> torch.Tensor:
        read.append(0)
        if len(read) > 2:
            raise RuntimeError("CUDA out of memory")
        return local_tensor(parameter)

    monkeypatch.setattr(shard_exchange, "local_tensor", fail_later)
    arrived = [rows for _, rows in exchange.run(transfers, state)]
    assert len(arrived) == len(transfers)
    assert [bool(rows.any()) for rows in arrived if rows is not None] == [True] * 2 + [False] * (2 * AHEAD)
    assert isinstance(exchange.error, RuntimeError)
    assert len(read) == 3
    monkeypatch.setattr(shard_exchange, "local_tensor", local_tensor)
    whole = torch.cat([rows for _, rows in exchange.run(transfers, state) if rows is not None])
    assert torch.equal(whole, state["weight"][: 2 * AHEAD + 2])
    assert exchange.error is None
