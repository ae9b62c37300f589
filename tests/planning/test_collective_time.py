"""Seconds of collectives: latency and bytes on the links that their ranks have, by the order of the mesh."""

import pytest

from dsv3.config.hardware import HardwareConfig, NetworkConfig
from dsv3.config.parallel import DispatchBackend
from dsv3.planning.collective_time import CollectiveTimes
from dsv3.planning.layout import ParallelDims
from dsv3.planning.step_shape import StepShape
from tests.planning.presets import preset

NETWORK = NetworkConfig(0.5, 0.5, 0.25, 0.25, 0.75, 0.75, 0.5, intra_seconds=1e-6, inter_seconds=1e-5)
FAST = HardwareConfig("x", intra_node_bandwidth=400e9, inter_node_bandwidth=40e9, network=NETWORK)


def links(degrees: ParallelDims, backend: DispatchBackend = DispatchBackend.all_to_all) -> CollectiveTimes:
    return CollectiveTimes(FAST, degrees, StepShape(1, 4096, ranks_per_node=8, dispatch=backend))


def test_a_ring_within_a_node_takes_its_latency_and_its_bytes() -> None:
    found = links(ParallelDims(dp_shard=2, tp=4))
    # Two doublings of 2 ranks; 200 GB/s.
    assert found.ring(found.tp, 2e9, starts=3) == pytest.approx(3 * 2e-6 + 2e9 / 200e9)
    assert links(ParallelDims()).ring(links(ParallelDims()).tp, 1e9) == 0


def test_a_ring_over_nodes_uses_a_port_per_rank_that_shares_a_node() -> None:
    """The shards of dp_shard 16 x tp 4 lie four apart, or one after the other where tp shards too."""
    found = links(ParallelDims(dp_shard=16, tp=4))
    apart, close = found.shards(16), found.shards(64)
    assert (apart.on_node(8), close.on_node(8)) == (2, 8)
    assert found.ring(apart, 1e9) == pytest.approx(4e-5 + 1e9 / (2 * 20e9))
    # Eight ports reach 160 of the 200 GB/s within a node.
    assert found.ring(close, 1e9) == pytest.approx(6e-5 + 1e9 / 160e9)
    replicas = links(ParallelDims(dp_replicate=4, dp_shard=8)).replicas
    assert (replicas.ranks, replicas.on_node(8)) == (4, 1)


def test_more_ports_are_no_faster_than_the_links_within_a_node() -> None:
    wide = HardwareConfig("x", intra_node_bandwidth=100e9, inter_node_bandwidth=40e9, network=NETWORK)
    found = CollectiveTimes(wide, ParallelDims(dp_shard=64), StepShape(1, 4096, ranks_per_node=8))
    assert found.ring(found.shards(64), 1e9) == pytest.approx(6e-5 + 1e9 / 50e9)


def test_token_dispatch_has_the_rate_of_its_backend_and_of_its_links() -> None:
    plain, deepep = links(ParallelDims(dp_shard=8, ep=8)), links(ParallelDims(), DispatchBackend.deepep)
    assert plain.dispatch(8, 1e9, 4, crosses=False) == pytest.approx(4 * 3e-6 + 1e9 / 100e9)
    assert plain.dispatch(8, 1e9, 4, crosses=True) == pytest.approx(4 * 3e-5 + 1e9 / 10e9)
    assert deepep.dispatch(8, 1e9, 2, crosses=False) == pytest.approx(2 * 3e-6 + 1e9 / 300e9)


def test_sends_stay_in_a_node_where_several_stages_share_it() -> None:
    assert links(ParallelDims(pp=4, dp_shard=2)).send(1e9) == pytest.approx(1e-6 + 1e9 / 200e9)
    assert links(ParallelDims(pp=4, dp_shard=8)).send(1e9) == pytest.approx(1e-5 + 1e9 / 20e9)
    # Two stages on each of two nodes: the slowest send is the one between the nodes.
    two = links(ParallelDims(pp=4, dp_shard=4))
    assert two.send(1e9) == pytest.approx(1e-5 + 1e9 / 20e9)
    assert two.shares_between_nodes(preset("671b"))["pp"] == pytest.approx(1 / 3)


def test_the_share_between_nodes_follows_from_the_places_of_an_axis() -> None:
    """Of a ring one rank per node sends to another node; of a token's rows those of the first exchange."""
    found = links(ParallelDims(pp=4, dp_replicate=2, dp_shard=16, cp=2, tp=2, ep=16))
    shares = found.shares_between_nodes(preset("671b"))
    assert (shares["tp"], shares["cp"], shares["pp"], shares["dp_replicate"]) == (0, 0, 1, 1)
    nodes, within = found.shape.dispatch_levels(preset("671b").moe, found.degrees)
    assert shares["ep"] == pytest.approx(nodes.sent / (nodes.sent + within.sent))
    # Experts lie 16 apart; most of a layer's weights are theirs, the rest has 8 or 4 ranks in a node.
    assert 0.8 < shares["dp"] < 1
    inside = links(ParallelDims(pp=4, dp_shard=2, tp=1, ep=2)).shares_between_nodes(preset("671b"))
    assert set(inside.values()) == {0.0}
    spread = links(ParallelDims(dp_shard=8, cp=8, tp=2)).shares_between_nodes(preset("671b"))
    assert (spread["cp"], spread["tp"]) == (1 / 4, 0)
