"""The device meshes of a layout: the same ranks cut in different ways (docs/parallelism.md)."""

import os
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from dsv3.distributed.process_group import RankContext
from dsv3.planning.layout import ParallelDims


class ParallelMesh:
    """All ranks of a layout, cut into named axes as each kind of parameter and of data needs it.

    The order of the ranks, outermost first, is pp, dp_replicate, dp_shard, cp, tp: the axes that exchange
    most lie closest together. Every view is cut from one root, as FSDP2 wants it of meshes it combines.
    """

    def __init__(self, degrees: ParallelDims, device_type: str, ranks_per_node: int | None = None) -> None:
        self.degrees = degrees
        d, ranks = degrees, torch.arange(degrees.world_size)
        self._root = DeviceMesh(device_type, ranks, mesh_dim_names=("world",))
        self.dense = self.cut(pp=d.pp, dp_replicate=d.dp_replicate, fsdp=d.fsdp_size, tp=d.tp)
        """Parameters that tensor parallelism splits."""
        stage = {"pp": d.pp, "dp_replicate": d.dp_replicate, "fsdp": d.replicated_fsdp_size}
        self.replicated = self.dense if d.tp == 1 else self.cut(**stage)
        """Every other parameter: whole where it computes, on a part of the sequence."""
        self.expert = self.replicated if d.ep == 1 else self.cut(**stage | {"fsdp": d.efsdp_size, "ep": d.ep})
        """Routed experts: ep borrows ranks of dp_shard, cp and tp."""
        self.cp = None if d.cp == 1 else self.cut(data=d.pp * d.data_parallel, cp=d.cp, tp=d.tp)
        """Rows in as many parts as context ranks."""
        self.sequence = (
            None if d.cp * d.tp == 1 else self.cut(data=d.pp * d.data_parallel, sequence=d.cp * d.tp)
        )
        """Rows in as many parts as ranks hold any of them."""
        node = ranks_per_node or int(os.environ.get("LOCAL_WORLD_SIZE", "0"))
        spans = 0 < node < d.ep and d.ep % node == 0
        self._nodes = self.cut(rest=d.world_size // d.ep, node=d.ep // node, local=node) if spans else None
        self.expert_buffer: Any = None
        """DeepEP's, which all stages of this rank share (deepep.py)."""

    @property
    def data_rank(self) -> int:
        """Which share of the rows this rank reads, of `degrees.data_parallel`."""
        d = self.degrees
        return self._root.get_rank() // (d.cp * d.tp) % d.data_parallel

    @cached_property
    def world(self) -> dist.ProcessGroup:
        """The group of all ranks of the layout."""
        return self._root.get_group()

    def shards(self, mesh: DeviceMesh) -> DeviceMesh:
        """The axes of `mesh` that FSDP works on: shards, and replicas where there are such."""
        return mesh["fsdp"] if self.degrees.dp_replicate == 1 else mesh["dp_replicate", "fsdp"]

    @property
    def exchange(self) -> list[dist.ProcessGroup]:
        """The groups a token passes through to an expert: one, or between nodes and then within."""
        if self._nodes is None:
            return [self.expert.get_group("ep")]
        return [self._nodes.get_group("node"), self._nodes.get_group("local")]

    def cut(self, **axes: int) -> DeviceMesh:
        """All ranks as these axes, the first the outermost; every rank calls it.

        An axis of one rank is left out, for each has a process group: but `fsdp`, which is always needed.
        """
        kept = {name: ranks for name, ranks in axes.items() if ranks > 1 or name == "fsdp"}
        return self._root._unflatten(0, tuple(kept.values()), tuple(kept))


def place(ranks: RankContext, mesh: ParallelMesh | None) -> RankContext:
    """`worker` with its share of the rows, as the layout has it."""
    if mesh is None:
        return ranks
    degrees = mesh.degrees
    shares = (mesh.data_rank, degrees.data_parallel)
    return replace(ranks, data=shares, loss_replicas=degrees.tp, group=mesh.world)


def build_mesh(degrees: ParallelDims, device_type: str, ranks_per_node: int | None = None) -> ParallelMesh:
    """The mesh over the first `degrees.world_size` ranks; every rank of the process group calls it.

    `ranks_per_node` null asks the launcher (LOCAL_WORLD_SIZE).
    """
    return ParallelMesh(degrees, device_type, ranks_per_node)
