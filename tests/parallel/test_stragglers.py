"""A rank that is slow in its data or in its forward pass is found; ranks that are slow alike are not."""

from dsv3.planning.layout import ParallelDims
from tests.harness.pool import Pool
from tests.parallel.tiny_training import configured
from tests.parallel.worker_stragglers import find_slow_rank

SLOW = 1
STAGES = ParallelDims(pp=2, dp_shard=2)
DATA, FORWARD, EVEN = {"data": [SLOW]}, {"forward": [SLOW]}, {"forward": [0, 1, 2, 3]}


def test_the_slow_rank_is_named_with_its_share_and_an_even_run_names_none(pool: Pool) -> None:
    config, degrees = configured(["parallel=fsdp", "train.global_batch_size=8"], 2), STAGES
    ranks = pool.run(find_slow_rank, config, degrees, 2, [DATA, FORWARD, EVEN])[: degrees.world_size]
    assert all(found == ranks[0] for found in ranks)
    data, forward, even = ranks[0]
    for windows in (data, forward):
        stragglers = [found for found, _ in windows if found is not None]
        assert [found.rank for found in stragglers] == [SLOW] * 3
        assert min(found.share for found in stragglers) > 0.1
        assert [bool(told) for _, told in windows] == [False, True, False]
        assert f"of a step for rank {SLOW} (" in windows[1][1]
    assert data[1][1].endswith(": it waits for its data")
    assert not forward[1][1].endswith("data")
    assert [told for _, told in even] == [""] * 3
