"""The layouts that tests compare with one process: every axis, every pair of axes, and triples on 8 ranks.

`ep` borrows ranks of the other axes, so a pair with `ep` needs ranks to borrow.
"""

from dsv3.planning.layout import ParallelDims

SINGLES = {
    "dp_shard": ParallelDims(dp_shard=2),
    "dp_replicate": ParallelDims(dp_replicate=2),
    "tp": ParallelDims(tp=2),
    "cp": ParallelDims(cp=2),
    "pp": ParallelDims(pp=2),
    "ep": ParallelDims(dp_shard=2, ep=2),
}
PAIRS = {
    "dp_replicate x dp_shard": ParallelDims(dp_replicate=2, dp_shard=2),
    "dp_replicate x tp": ParallelDims(dp_replicate=2, tp=2),
    "dp_replicate x cp": ParallelDims(dp_replicate=2, cp=2),
    "dp_replicate x pp": ParallelDims(dp_replicate=2, pp=2),
    "dp_replicate x ep": ParallelDims(dp_replicate=2, dp_shard=2, ep=2),
    "dp_shard x tp": ParallelDims(dp_shard=2, tp=2),
    "dp_shard x cp": ParallelDims(dp_shard=2, cp=2),
    "dp_shard x pp": ParallelDims(dp_shard=2, pp=2),
    "dp_shard x ep": ParallelDims(dp_shard=4, ep=2),
    "tp x cp": ParallelDims(tp=2, cp=2),
    "tp x pp": ParallelDims(tp=2, pp=2),
    "tp x ep": ParallelDims(tp=2, ep=2),
    "cp x pp": ParallelDims(cp=2, pp=2),
    "cp x ep": ParallelDims(cp=2, ep=2),
    "pp x ep": ParallelDims(pp=2, dp_shard=2, ep=2),
}
TRIPLES = {
    "dp_shard x cp x tp, ep 4": ParallelDims(dp_shard=2, cp=2, tp=2, ep=4),
    "pp x cp x tp, ep 2": ParallelDims(pp=2, cp=2, tp=2, ep=2),
    "pp x dp_shard x tp, ep 4": ParallelDims(pp=2, dp_shard=2, tp=2, ep=4),
    "pp x dp_shard x cp": ParallelDims(pp=2, dp_shard=2, cp=2),
    "dp_replicate x dp_shard x tp, ep 2": ParallelDims(dp_replicate=2, dp_shard=2, tp=2, ep=2),
    "dp_replicate x pp x cp, ep 2": ParallelDims(dp_replicate=2, pp=2, cp=2, ep=2),
}
SCHEDULES = ["GPipe", "1F1B", "Interleaved1F1B", "InterleavedZeroBubble", "ZBVZeroBubble", "DualPipeV"]
