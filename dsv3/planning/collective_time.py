"""Seconds of collectives: a latency, and the bytes that a rank sends at the bandwidth of its group.

Which links a group uses follows from the mesh. Its axes are, outermost first, pp, dp_replicate, dp_shard, cp
and tp, and ranks are numbered along them, so that `tp` takes neighbours; `ep` takes runs of neighbours within
dp_shard x cp x tp. A ring over several nodes passes through each node once. With g ranks in each node it uses
g network ports, so its bandwidth is g times that between nodes, at most that within a node.
"""

import itertools
import math
from dataclasses import dataclass

from dsv3.config.hardware import HardwareConfig
from dsv3.config.model import ModelConfig
from dsv3.config.parallel import DispatchBackend
from dsv3.planning.group_bytes import stage_bytes
from dsv3.planning.layout import ParallelDims
from dsv3.planning.pipeline_stages import StageLayers
from dsv3.planning.step_shape import StepShape


@dataclass(frozen=True)
class Group:
    """Ranks of a collective: how many, and how many places of the numbering lie between two of them."""

    ranks: int
    stride: int

    def on_node(self, node: int) -> int:
        """Return how many of the ranks share a node of `node` ranks."""
        return min(self.ranks, max(1, node // self.stride))

    def between_nodes(self, node: int) -> float:
        """Return the share of a ring's bytes that leaves a node of `node` ranks."""
        together = self.on_node(node)
        return 0.0 if together == self.ranks else 1 / together


class CollectiveTimes:
    """The times of a layout's collectives on a kind of hardware."""

    def __init__(self, hardware: HardwareConfig, degrees: ParallelDims, shape: StepShape) -> None:
        self.network, self.degrees, self.shape = hardware.network, degrees, shape
        # A hardware file may leave out the links that its machine does not have; one rank needs none.
        intra, inter = hardware.intra_node_bandwidth, hardware.inter_node_bandwidth
        self.intra: float = intra or inter or math.inf
        self.inter: float = inter or self.intra
        self.node = shape.ranks_per_node or degrees.world_size

    @property
    def tp(self) -> Group:
        """Ranks that share a layer."""
        return Group(self.degrees.tp, 1)

    @property
    def cp(self) -> Group:
        """Ranks that share a sequence."""
        return Group(self.degrees.cp, self.degrees.tp)

    @property
    def replicas(self) -> Group:
        """Ranks that hold the same shards."""
        return Group(self.degrees.dp_replicate, self.degrees.replicated_fsdp_size)

    def shards(self, ranks: int) -> Group:
        """Return the `ranks` ranks over which FSDP shards a weight: all of a stage, or every n-th one."""
        return Group(ranks, self.degrees.replicated_fsdp_size // ranks)

    def ring(self, group: Group, sent: float, starts: float = 1) -> float:
        """Return the seconds of all-gathers or reduce-scatters in which each rank sends `sent` bytes."""
        if group.ranks == 1:
            return 0.0
        n, together = self.network, group.on_node(self.node)
        within = self.intra * n.ring_intra
        if together == group.ranks:
            return starts * self._latency(group.ranks, n.intra_seconds) + sent / within
        between = min(within, together * self.inter * n.ring_inter)
        return starts * self._latency(group.ranks, n.inter_seconds) + sent / between

    def dispatch(self, ranks: int, sent: float, starts: float, crosses: bool) -> float:
        """Return the seconds of an exchange of rows over `ranks` ranks, within a node unless it `crosses`."""
        n, deepep = self.network, self.shape.dispatch is DispatchBackend.deepep
        if crosses:
            share = n.deepep_inter if deepep else n.all_to_all_inter
            return starts * self._latency(ranks, n.inter_seconds) + sent / (self.inter * share)
        share = n.deepep_intra if deepep else n.all_to_all_intra
        return starts * self._latency(ranks, n.intra_seconds) + sent / (self.intra * share)

    def send(self, sent: float) -> float:
        """Return the seconds of the slowest send from one pipeline stage to the next."""
        n = self.network
        if self._stage_pairs_between_nodes() == 0:
            return n.intra_seconds + sent / (self.intra * n.send)
        return n.inter_seconds + sent / (self.inter * n.send)

    def shares_between_nodes(self, model: ModelConfig) -> dict[str, float]:
        """Return the share of each axis's bytes that leaves a node; `dp` is that of an MoE layer."""
        degrees, node = self.degrees, self.node
        layer = StageLayers(1, 3, (False,), 0)
        (_, block) = stage_bytes(model, layer, degrees, self.shape.state, self.shape.gathers_in_fp8)
        sent = sum(size for _, size in block.all_gather)
        crossing = sum(size * self.shards(ranks).between_nodes(node) for ranks, size in block.all_gather)
        levels = self.shape.dispatch_levels(model.moe, degrees)
        rows = sum(level.sent for level in levels)
        first = levels[0].sent if len(levels) == 2 or (levels and levels[0].ranks > node) else 0.0
        return {
            "dp": crossing / sent if sent else 0.0,
            "dp_replicate": self.replicas.between_nodes(node),
            "tp": self.tp.between_nodes(node),
            "cp": self.cp.between_nodes(node),
            "ep": first / rows if rows else 0.0,
            "pp": self._stage_pairs_between_nodes(),
        }

    def _stage_pairs_between_nodes(self) -> float:
        """Return the share of pairs of neighbouring stages whose ranks are not on one node."""
        degrees, stage = self.degrees, self.degrees.world_size // self.degrees.pp
        if degrees.pp == 1:
            return 0.0
        places = [number * stage // self.node for number in range(degrees.pp)]
        apart = sum(a != b for a, b in itertools.pairwise(places))
        return apart / (degrees.pp - 1)

    def _latency(self, ranks: int, seconds: float) -> float:
        """Return the latency of one collective, in as many steps as two ranks must double to be `ranks`."""
        return seconds * math.log2(max(ranks, 2))
