"""Device meshes of a layout: one set of ranks cut into named axes in several ways (docs/parallelism.md)."""

import os
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from dsv3.distributed.process_group import RankContext
from dsv3.distributed.torch_private import unflatten_mesh
from dsv3.planning.layout import ParallelDims


class ParallelMesh:
    """The first `degrees.world_size` ranks, cut into the axes that each kind of parameter and data needs.

    Every rank of the process group constructs it. `ranks_per_node` null asks the launcher
    (LOCAL_WORLD_SIZE). The order of the ranks, outermost first, is pp, dp_replicate, dp_shard, cp, tp: the
    axes that communicate most lie closest together. Every mesh is cut from one root, because FSDP2
    combines only meshes of one root.
    """

    def __init__(self, degrees: ParallelDims, device_type: str, ranks_per_node: int | None = None) -> None:
        self.degrees = degrees
        d, ranks = degrees, torch.arange(degrees.world_size)
        self._root = DeviceMesh(device_type, ranks, mesh_dim_names=("world",))
        self.dense = self.cut(pp=d.pp, dp_replicate=d.dp_replicate, fsdp=d.fsdp_size, tp=d.tp)
        """For parameters that tensor parallelism shards."""
        stage = {"pp": d.pp, "dp_replicate": d.dp_replicate, "fsdp": d.replicated_fsdp_size}
        self.replicated = self.dense if d.tp == 1 else self.cut(**stage)
        """For every other parameter: whole while it computes, on a shard of the sequence."""
        self.expert = self.replicated if d.ep == 1 else self.cut(**stage | {"fsdp": d.efsdp_size, "ep": d.ep})
        """For routed experts: ep borrows ranks of dp_shard, cp and tp."""
        self.cp = None if d.cp == 1 else self.cut(data=d.pp * d.data_parallel, cp=d.cp, tp=d.tp)
        """For rows sharded over the context ranks."""
        self.sequence = (
            None if d.cp * d.tp == 1 else self.cut(data=d.pp * d.data_parallel, sequence=d.cp * d.tp)
        )
        """For rows sharded over all ranks that hold a part of them: cp and tp."""
        node = ranks_per_node or int(os.environ.get("LOCAL_WORLD_SIZE", "0"))
        spans = 0 < node < d.ep and d.ep % node == 0
        self._nodes = self.cut(rest=d.world_size // d.ep, node=d.ep // node, local=node) if spans else None
        self.expert_buffer: Any = None
        """DeepEP's buffer, which all pipeline stages of this rank share (deepep.py)."""

    @property
    def data_rank(self) -> int:
        """Return this rank's index among the `degrees.data_parallel` data shards."""
        d = self.degrees
        return self._root.get_rank() // (d.cp * d.tp) % d.data_parallel

    @cached_property
    def world(self) -> dist.ProcessGroup:
        """Return the group of all ranks of the layout."""
        return self._root.get_group()

    def fsdp_axes(self, mesh: DeviceMesh) -> DeviceMesh:
        """Return the axes of `mesh` that FSDP works on: shards, and replicas where there are any."""
        return mesh["fsdp"] if self.degrees.dp_replicate == 1 else mesh["dp_replicate", "fsdp"]

    @property
    def expert_groups(self) -> list[dist.ProcessGroup]:
        """Return the groups of token dispatch: `ep`, or first between nodes and then within a node."""
        if self._nodes is None:
            return [self.expert.get_group("ep")]
        return [self._nodes.get_group("node"), self._nodes.get_group("local")]

    def cut(self, **axes: int) -> DeviceMesh:
        """Cut all ranks into `axes`, the first the outermost; every rank calls it.

        Axes of one rank are left out, because each axis costs a process group; `fsdp` is always needed.
        """
        kept = {name: ranks for name, ranks in axes.items() if ranks > 1 or name == "fsdp"}
        return unflatten_mesh(self._root, kept)


def assign_data_shard(ranks: RankContext, mesh: ParallelMesh | None) -> RankContext:
    """Return `ranks` with the data shard, the loss replicas and the process group of the layout."""
    if mesh is None:
        return ranks
    degrees = mesh.degrees
    data_shard = (mesh.data_rank, degrees.data_parallel)
    return replace(ranks, data=data_shard, loss_replicas=degrees.tp, group=mesh.world)
