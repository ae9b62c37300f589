"""The layouts that are compared with one process: each axis, each pair of axes, and triples on 8 ranks.

Experts borrow ranks of the other axes, so that a pair with `ep` needs ranks to borrow.
"""

from dsv3.planning.layout import Degrees

SINGLES = {
    "dp_shard": Degrees(dp_shard=2),
    "dp_replicate": Degrees(dp_replicate=2),
    "tp": Degrees(tp=2),
    "cp": Degrees(cp=2),
    "pp": Degrees(pp=2),
    "ep": Degrees(dp_shard=2, ep=2),
}
PAIRS = {
    "dp_replicate x dp_shard": Degrees(dp_replicate=2, dp_shard=2),
    "dp_replicate x tp": Degrees(dp_replicate=2, tp=2),
    "dp_replicate x cp": Degrees(dp_replicate=2, cp=2),
    "dp_replicate x pp": Degrees(dp_replicate=2, pp=2),
    "dp_replicate x ep": Degrees(dp_replicate=2, dp_shard=2, ep=2),
    "dp_shard x tp": Degrees(dp_shard=2, tp=2),
    "dp_shard x cp": Degrees(dp_shard=2, cp=2),
    "dp_shard x pp": Degrees(dp_shard=2, pp=2),
    "dp_shard x ep": Degrees(dp_shard=4, ep=2),
    "tp x cp": Degrees(tp=2, cp=2),
    "tp x pp": Degrees(tp=2, pp=2),
    "tp x ep": Degrees(tp=2, ep=2),
    "cp x pp": Degrees(cp=2, pp=2),
    "cp x ep": Degrees(cp=2, ep=2),
    "pp x ep": Degrees(pp=2, dp_shard=2, ep=2),
}
TRIPLES = {
    "dp_shard x cp x tp, ep 4": Degrees(dp_shard=2, cp=2, tp=2, ep=4),
    "pp x cp x tp, ep 2": Degrees(pp=2, cp=2, tp=2, ep=2),
    "pp x dp_shard x tp, ep 4": Degrees(pp=2, dp_shard=2, tp=2, ep=4),
    "pp x dp_shard x cp": Degrees(pp=2, dp_shard=2, cp=2),
    "dp_replicate x dp_shard x tp, ep 2": Degrees(dp_replicate=2, dp_shard=2, tp=2, ep=2),
    "dp_replicate x pp x cp, ep 2": Degrees(dp_replicate=2, pp=2, cp=2, ep=2),
}
SCHEDULES = ["GPipe", "1F1B", "Interleaved1F1B", "InterleavedZeroBubble", "ZBVZeroBubble", "DualPipeV"]
