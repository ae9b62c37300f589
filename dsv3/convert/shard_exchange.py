"""Bring the rows of HF tensors from the ranks that hold them to the rank that writes them.

Every rank owns some files of an export, and holds shards of tensors in files of others. Rows travel in slices
of at most 16 MiB, straight from a rank that holds them to the one that writes them, on the CPU. No tensor is
gathered, and of replicas one is sent.

Slices have one order, which all ranks follow. A rank begins AHEAD further slices before it waits for the
oldest. So ranks never wait for one another in a circle: of all unfinished slices the first has been begun, or
is about to be, by each rank that takes part in it.
"""

from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from dsv3.checkpoint.state import local_tensor
from dsv3.convert.dcp_source import intersect, relative_index
from dsv3.distributed.process_group import RankContext
from dsv3.distributed.torch_private import local_shape_and_offset
from dsv3.hf.names import HFTensor
from dsv3.hf.nonfinite import require_finite_export
from dsv3.hf.safetensors_header import byte_view

AHEAD = 2
"""Slices that a rank begins before the oldest of them is finished."""


class Box(NamedTuple):
    """A part of a parameter: offset and sizes by dim."""

    offset: tuple[int, ...]
    sizes: tuple[int, ...]


class RowTransfer(NamedTuple):
    """Rows [first, first + rows) of an HF tensor that go to the rank `writer` in `dtype`."""

    order: tuple[int, int]
    """Position of the slice among those of a round: byte of the file, and file."""
    writer: int
    tensor: HFTensor
    first: int
    rows: int
    dtype: torch.dtype


def local_box(tensor: Tensor) -> Box:
    """Return the box of a parameter that this rank's shard is."""
    if isinstance(tensor, DTensor):
        sizes, offset = local_shape_and_offset(tensor)
        return Box(tuple(offset), tuple(sizes))
    return Box((0,) * tensor.dim(), tuple(tensor.shape))


class ShardMap:
    """The boxes that tile each parameter, and for each box the one rank that sends it.

    Every rank holds the whole map: for 671b on 2,048 ranks some 160,000 boxes, 30 MB.
    """

    def __init__(
        self, boxes_by_rank: Iterable[Mapping[str, Box]], shapes: Mapping[str, tuple[int, ...]]
    ) -> None:
        holders: dict[str, dict[Box, list[int]]] = {name: {} for name in shapes}
        for rank, boxes in enumerate(boxes_by_rank):
            for name, box in boxes.items():
                if 0 not in box.sizes:
                    holders[name].setdefault(box, []).append(rank)
        self.senders: dict[str, dict[Box, int]] = {}
        for number, (name, shape) in enumerate(shapes.items()):
            # Replicas take turns, so that the first of them does not send everything.
            chosen = {box: ranks[number % len(ranks)] for box, ranks in holders[name].items()}
            held = sum(torch.Size(box.sizes).numel() for box in chosen)
            if held != torch.Size(shape).numel():
                raise RuntimeError(f"the ranks' boxes of {name} {list(shape)} hold {held} values")
            self.senders[name] = chosen

    def sent_by(self, rank: int) -> dict[str, Box]:
        """Return the box of each parameter that a rank sends; without those that a replica sends."""
        return {
            name: box
            for name, boxes in self.senders.items()
            for box, sender in boxes.items()
            if sender == rank
        }


class ShardExchange:
    """Puts slices of HF tensors together on the ranks that write them; all ranks make and use it together.

    Args:
        state: this rank's part of the model, by parameter.
        shapes: of all parameters of the whole model.
    """

    def __init__(
        self, state: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]], ranks: RankContext
    ) -> None:
        self.ranks = ranks
        self._boxes = {name: local_box(tensor) for name, tensor in state.items()}
        self._map = ShardMap(ranks.all_gather_object(self._boxes), shapes)
        self._sent = self._map.sent_by(ranks.rank)
        self._group = ranks.in_background().group
        self._state: Mapping[str, Tensor] = {}
        self.error: Exception | None = None
        """What kept this rank from sending rows: it sends zeros from then on, so that nobody waits for it."""

    def sends(self, tensor: HFTensor, first: int = 0, count: int | None = None) -> bool:
        """Return whether this rank sends any of the rows [first, first + count) of a tensor, None: of all."""
        box = self._sent.get(tensor.parameter)
        if box is None:
            return False
        whole = tensor.shape[0] if tensor.shape else 1
        return intersect(*tensor.box_of_rows(first, whole if count is None else count), *box) is not None

    def run(
        self, transfers: Iterable[RowTransfer], state: Mapping[str, Tensor]
    ) -> Iterator[tuple[RowTransfer, Tensor | None]]:
        """Take part in `transfers`, those of this rank in their order; yield each when it is finished.

        With it come its rows, on the CPU, where this rank writes them, else None. The caller must go on to
        the end, also where it can no longer write: others wait for their turn. `state` has the values.
        """
        self._state, self.error = state, None
        begun: deque[tuple[RowTransfer, _Arrival]] = deque()
        for transfer in transfers:
            begun.append((transfer, self._begin(transfer)))
            if len(begun) > AHEAD:
                oldest, arrival = begun.popleft()
                yield oldest, arrival.wait()
        for oldest, arrival in begun:
            yield oldest, arrival.wait()

    def _begin(self, transfer: RowTransfer) -> "_Arrival":
        """Begin to send this rank's rows of a slice, or to receive those of all ranks."""
        tensor, me, arrival = transfer.tensor, self.ranks.rank, _Arrival()
        offset, sizes = tensor.box_of_rows(transfer.first, transfer.rows)
        if transfer.writer != me:
            shared = intersect(offset, sizes, *self._sent[tensor.parameter])
            if shared is not None:
                part = self._own_part(tensor.parameter, *shared, transfer.dtype)
                arrival.send(part, transfer.writer, self._group)
            return arrival
        arrival.rows = torch.empty(
            (transfer.rows, *tensor.shape[1:])[: len(tensor.shape)], dtype=transfer.dtype
        )
        for box, sender in self._map.senders[tensor.parameter].items():
            shared = intersect(offset, sizes, *box)
            if shared is not None:
                target = arrival.rows.view(sizes)[relative_index(*shared, offset)]
                if sender == me:
                    target.copy_(self._own_part(tensor.parameter, *shared, transfer.dtype))
                else:
                    arrival.receive(target, sender, self._group)
        return arrival

    @torch.no_grad()
    def _own_part(self, name: str, low: list[int], high: list[int], dtype: torch.dtype) -> Tensor:
        """Return the box from `low` to `high` of a parameter, from this rank's shard, on the CPU.

        A value that is not finite is an error of this rank, found before anyone gets it.
        """
        if self.error is None:
            try:
                local = local_tensor(self._state[name])
                part = local[relative_index(low, high, self._boxes[name].offset)]
                rounded = part.to(dtype).cpu().contiguous()
                require_finite_export(rounded, part, name, low)
                return rounded
            except Exception as error:
                self.error = error
        return torch.zeros([end - begin for begin, end in zip(low, high, strict=True)], dtype=dtype)


class _Arrival:
    """The messages of one slice on this rank, and where its rows arrive."""

    def __init__(self) -> None:
        self.rows: Tensor | None = None
        self._messages: list[tuple[dist.Work | None, Tensor]] = []
        self._staged: list[tuple[Tensor, Tensor]] = []  # columns: messages are contiguous

    def send(self, part: Tensor, rank: int, group: dist.ProcessGroup | None) -> None:
        self._messages.append((dist.isend(byte_view(part), group=group, group_dst=rank), part))

    def receive(self, target: Tensor, rank: int, group: dist.ProcessGroup | None) -> None:
        part = target
        if not target.is_contiguous():
            part = torch.empty(target.shape, dtype=target.dtype)
            self._staged.append((target, part))
        self._messages.append((dist.irecv(byte_view(part), group=group, group_src=rank), part))

    def wait(self) -> Tensor | None:
        """Return the rows, once all messages are through; None on a rank that sends."""
        for work, _ in self._messages:
            if work is not None:
                work.wait()
        for target, part in self._staged:
            target.copy_(part)
        return self.rows
