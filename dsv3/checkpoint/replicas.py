"""Compare what several ranks hold of the same: replicas of the training state must be equal, bit for bit.

A device that computes wrongly now and then, or memory that loses a bit, does not stop a run: it trains on,
and replicas drift apart. What has replicas follows from the placements of the tensors (docs/reliability.md):

- a DTensor has one on each rank of its replicated mesh axes: under dp_replicate every weight and moment;
- a plain tensor is the same on every rank of its pipeline stage: expert biases, step counts of the optimizer;
- the embedding is on the first and the last pipeline stage where MTP shares it;
- steps, samples and statistics of the run, and the optimizer's settings, are the same on all ranks.

Tensors whose replicas lie on the same ranks make up a group. Ranks exchange a checksum per group, 16 bytes
each, by one all-gather. Only where one differs do they look for the rank, the tensor and the element.
"""

import json
import socket
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import xxhash
from torch import Tensor
from torch.distributed.tensor import DTensor

from dsv3.checkpoint.bit_sums import BitSums, Place, bit_sums, checksum, find_difference, words_of
from dsv3.checkpoint.directory import Progress
from dsv3.checkpoint.state import (
    OPTIMIZER_PREFIX,
    ModelParts,
    local_tensor,
    model_state,
    optimizer_state,
)
from dsv3.distributed.process_group import RankContext
from dsv3.distributed.torch_private import local_shape_and_offset
from dsv3.errors import RunFailed
from dsv3.hf.names import MODEL_PREFIX
from dsv3.model.transfers import upload
from dsv3.model.transformer import Transformer

GROUPS_PER_PART = 16
"""Groups of a part of the model at most: plain tensors and those of three meshes, the embedding's apart. The
statistics of Adafactor have no part in some axes, and make up more groups."""

SMALL = 2**20
"""Words of a tensor up to which it is summed together with others: a launch per tensor would take longer."""

PACK = 2**24
"""Words that are copied at a time to be summed together."""

NAMED = 2
"""Groups, and tensors of each, that a message names."""

ODD_ONES = 4
"""Ranks of a group that are looked at, besides one that holds what most others hold."""

LONGEST = 260
"""Characters of the part of a message that says what differs."""

_EMBEDDING = "embedding.weight"


@dataclass
class ReplicaGroup:
    """Tensors of this rank whose replicas lie on the same ranks, by name in sorted order."""

    tensors: dict[str, Tensor]
    placement: tuple[Any, ...] = ()
    """Axes of the mesh with their sizes and, where they shard, this rank's place: equal on all holders."""

    @property
    def key(self) -> int:
        """Return a number, never 0, that all ranks with replicas of these tensors have in common."""
        text = "\n".join([repr(self.placement), *self.tensors])
        return _odd(text)

    def checksum(self) -> Tensor:
        """Return one checksum of all tensors, an int64 scalar; on a GPU nothing waits for it."""
        totals: dict[torch.device, list[Tensor]] = defaultdict(list)
        packs: dict[torch.device, list[Tensor]] = defaultdict(list)
        counts: dict[torch.device, int] = defaultdict(int)

        def close(device: torch.device) -> None:
            if packs[device]:
                found = checksum(torch.cat(packs.pop(device)))
                totals[device].append(found * _odd(f"pack {len(totals[device])}"))
                counts[device] = 0

        for name, tensor in self.tensors.items():
            words, device = words_of(local_tensor(tensor)), tensor.device
            if len(words) > SMALL:
                totals[device].append(checksum(words) * _odd(name))
                continue
            if counts[device] + len(words) > PACK:
                close(device)
            packs[device].append(words)
            counts[device] += len(words)
        for device in list(packs):
            close(device)
        sums = [torch.stack(found).sum() for found in totals.values()]
        device = next((each.device for each in sums if each.is_cuda), torch.device("cpu"))
        return torch.stack([upload(each, device) for each in sums]).sum()

    def checksum_of_each(self) -> list[int]:
        """Return a checksum per tensor."""
        return [int(checksum(words_of(local_tensor(tensor)))) for tensor in self.tensors.values()]


def replica_groups(
    model_parts: ModelParts, optimizer: torch.optim.Optimizer, progress: Progress
) -> list[ReplicaGroup]:
    """Return what this rank holds that others hold too; a tensor without replicas is in no group.

    Random states are left out: nothing draws from the global generators in training, and a caller's own draws
    may differ between ranks. Counters that every step sets to 0 are no state.
    """
    groups = [ReplicaGroup(dict(_of_progress(progress)), ("run",))]
    for part in model_parts:
        found: dict[tuple[Any, ...], dict[str, Tensor]] = defaultdict(dict)
        named = [*model_state([part]), *optimizer_state([part], optimizer), *_settings(part, optimizer)]
        twice = _is_on_two_stages(part)
        for name, tensor in named:
            shared = twice and (
                name == MODEL_PREFIX + _EMBEDDING or name.startswith(f"{OPTIMIZER_PREFIX}{_EMBEDDING}.")
            )
            placement = _placement(tensor)
            replicated = any(size > 1 and place is None for _, size, place in placement)
            if replicated or shared or not isinstance(tensor, DTensor):
                found[(shared, *placement)][name] = tensor
        assert len(found) <= GROUPS_PER_PART
        groups += [
            ReplicaGroup(dict(sorted(tensors.items())), placement) for placement, tensors in found.items()
        ]
    return groups


class _Holder(NamedTuple):
    """A rank, and the number of one of its groups: a rank may hold two replicas, as under DualPipeV."""

    rank: int
    slot: int


class Replicas:
    """Compares the replicas of one run; all ranks call it together."""

    def __init__(self, ranks: RankContext, run_dir: Path) -> None:
        self.ranks = ranks
        self.run_dir = run_dir
        self._equal_at: tuple[int, int] | None = None

    def compare(self, model_parts: ModelParts, optimizer: torch.optim.Optimizer, progress: Progress) -> None:
        """Compare all replicas, once per step; the host waits for the device.

        Raises:
            RunFailed: some differ; on all ranks. The message names ranks, hosts and tensors.
        """
        now = progress.step, progress.samples  # after a rewind a step is taken again, with other samples
        if self.ranks.world == 1 or self._equal_at == now:
            return
        groups = replica_groups(model_parts, optimizer, progress)
        found = self._differing(groups, 1 + GROUPS_PER_PART * len(model_parts))
        if found:
            told = "; ".join(self._describe(holders, groups) for holders in found[:NAMED])
            more = f" and {len(found) - NAMED} more groups of tensors" if len(found) > NAMED else ""
            told = told if len(told) <= LONGEST else f"{told[: LONGEST - 3]}..."
            step = self.ranks.broadcast_object(progress.step)
            raise RunFailed(
                f"after step {step} ranks differ in what they must hold alike: {told}{more}. Nothing "
                "is saved; a device, memory or link of theirs may be broken. Go on from the last checkpoint: "
                f"resume={self.run_dir}"
            )
        self._equal_at = now

    def _differing(self, groups: list[ReplicaGroup], slots: int) -> list[dict[int, list[_Holder]]]:
        """Return for each group that differs its holders by checksum, the same on all ranks."""
        device = self.ranks.device
        keys = [group.key for group in groups]
        sums = torch.stack([upload(group.checksum(), device) for group in groups])
        padding = torch.zeros(2, slots - len(groups), dtype=torch.int64)
        own = torch.stack([upload(torch.tensor(keys), device), sums])
        table = self.ranks.all_gather(torch.cat([own, upload(padding, device)], 1)).cpu().numpy()
        pairs = table.transpose(0, 2, 1).reshape(-1, 2)  # [rank x slot, key and sum]
        distinct = np.unique(pairs[pairs[:, 0] != 0], axis=0)
        found_keys, counts = np.unique(distinct[:, 0], return_counts=True)
        differing = []
        for key in found_keys[counts > 1]:
            holders: dict[int, list[_Holder]] = defaultdict(list)
            for row in np.flatnonzero(pairs[:, 0] == key).tolist():
                holders[int(pairs[row, 1])].append(_Holder(*divmod(row, slots)))
            differing.append(dict(holders))
        return sorted(differing, key=lambda holders: min(map(min, holders.values())))

    def _describe(self, holders: dict[int, list[_Holder]], groups: list[ReplicaGroup]) -> str:
        """Return which ranks of a group differ, and in what; all ranks call it together."""
        by_size = sorted(holders.values(), key=lambda alike: (-len(alike), alike))
        has_majority = len(by_size[0]) > len(by_size[1])
        reference = by_size[0][0]
        odd_ones = sorted(holder for alike in by_size[1:] for holder in alike)
        total = len(by_size[0]) + len(odd_ones)
        hosts, sums = {}, {}
        for holder in [reference, *odd_ones[:ODD_ONES]]:
            own = holder.rank == self.ranks.rank
            mine: Any = (socket.gethostname(), groups[holder.slot].checksum_of_each()) if own else None
            hosts[holder], sums[holder] = self.ranks.broadcast_object(mine, holder.rank)
        expected, first = sums[reference], odd_ones[0]
        differing = [n for n in range(len(expected)) if any(each[n] != expected[n] for each in sums.values())]
        other = self._bit_sums_of(first, groups, differing[0]) if differing else None
        what = None
        if self.ranks.rank == reference.rank:
            tensors = list(groups[reference.slot].tensors.items())
            names = [tensors[n][0] for n in differing[:NAMED]]
            if other is not None:
                names[0] += _where(tensors[differing[0]][1], other)
            more = f" and {len(differing) - NAMED} more" if len(differing) > NAMED else ""
            what = ", ".join(names) + more if names else "nothing, once they were read again"
        what = self.ranks.broadcast_object(what, reference.rank)
        odd = ", ".join(f"rank {each.rank} ({hosts[each]})" for each in odd_ones[:ODD_ONES])
        odd += f" and {len(odd_ones) - ODD_ONES} more" if len(odd_ones) > ODD_ONES else ""
        if has_majority:
            return f"{odd}, of {total} ranks, in {what}"
        return f"rank {reference.rank} ({hosts[reference]}) and {odd} in {what}"

    def _bit_sums_of(self, holder: _Holder, groups: list[ReplicaGroup], number: int) -> BitSums:
        """Return the sums of a holder's tensor of the group, on the CPU and on all ranks."""
        mine: Any = None
        if holder.rank == self.ranks.rank:
            tensor = list(groups[holder.slot].tensors.values())[number]
            mine = [each.cpu().numpy() for each in bit_sums(words_of(local_tensor(tensor)))]
        return BitSums(*map(torch.from_numpy, self.ranks.broadcast_object(mine, holder.rank)))


def _placement(tensor: Tensor) -> tuple[tuple[str, int, int | None], ...]:
    """Return of each mesh axis name, size and this rank's place, which is None where the axis replicates."""
    if not isinstance(tensor, DTensor):
        return ()
    mesh = tensor.device_mesh
    places = mesh.get_coordinate() or [0] * mesh.ndim
    return tuple(
        (name, mesh.size(axis), None if tensor.placements[axis].is_replicate() else places[axis])
        for axis, name in enumerate(mesh.mesh_dim_names or ("",) * mesh.ndim)
    )


def _is_on_two_stages(part: Transformer) -> bool:
    """Return True where the embedding of this pipeline stage is another's too: MTP needs it at the end."""
    if part.embedding is None or not part.config.mtp_depths:
        return False
    return part.head is None or getattr(part.embedding.weight, "is_replica", False)


def _of_progress(progress: Progress) -> Iterator[tuple[str, Tensor]]:
    """Yield for every field of the progress a number that stands for its value."""
    for name, value in sorted(asdict(progress).items()):
        yield f"progress.{name}", torch.tensor(_hash(json.dumps(value, sort_keys=True, default=repr)))


def _settings(part: Transformer, optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, Tensor]]:
    """Yield a number for the settings of each parameter group, such as its learning rate."""
    names = {id(parameter): name for name, parameter in part.named_parameters()}
    for group in optimizer.param_groups:
        own = [names[id(parameter)] for parameter in group["params"] if id(parameter) in names]
        if own:
            settings = {key: value for key, value in group.items() if key != "params"}
            scalars = {key: value for key, value in settings.items() if not isinstance(value, Tensor)}
            yield f"optimizer.settings.{own[0]}", torch.tensor(_hash(repr(sorted(scalars.items()))))


def _where(tensor: Tensor, other: BitSums) -> str:
    """Return the place in the whole tensor at which `other` differs: ` [3, 17] bit 30`, or nothing."""
    local = local_tensor(tensor)
    own = BitSums(*(each.cpu() for each in bit_sums(words_of(local))))
    place: Place | None = find_difference(own, other, local)
    if place is None:
        return ""
    offset = local_shape_and_offset(tensor)[1] if isinstance(tensor, DTensor) else (0,) * local.ndim
    index = np.unravel_index(place.element, tuple(local.shape))
    whole = [int(n) + start for n, start in zip(index, offset, strict=True)]
    return f" {whole}" * bool(whole) + ("" if place.bit is None else f" bit {place.bit}")


def _odd(text: str) -> int:
    """Return an odd number that stands for a text: as a factor of checksums it notices exchanged ones."""
    return _hash(text) | 1


def _hash(text: str) -> int:
    """Return 64 bits of a text's hash as a signed number."""
    return int.from_bytes(xxhash.xxh3_64_digest(text.encode()), "big", signed=True)
