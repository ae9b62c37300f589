import re
from dataclasses import replace

import pytest

from dsv3.config.model import ModelConfig
from dsv3.config.parallel import DegreesConfig, ParallelConfig
from dsv3.errors import UserError
from dsv3.planning.layout import ParallelDims, fill_auto_degrees
from tests.harness.commands import PlannedCommand
from tests.planning.presets import preset

MODEL = preset("16b")
V3 = preset("671b")
AUTO = DegreesConfig(pp="auto", dp_replicate="auto", dp_shard="auto", cp="auto", tp="auto", ep="auto")


def filled(config: DegreesConfig, world: int, model: ModelConfig = MODEL, length: int = 4096) -> ParallelDims:
    return fill_auto_degrees(ParallelConfig(degrees=config), world, model, length)


def test_dp_shard_takes_what_is_left_and_the_others_are_one() -> None:
    degrees = filled(DegreesConfig(tp=2, pp=3, ep=8), 48)
    assert degrees == ParallelDims(pp=3, dp_replicate=1, dp_shard=8, cp=1, tp=2, ep=8)
    assert filled(DegreesConfig(tp=2, dp_shard="auto"), 8).dp_shard == 4


def test_dp_replicate_takes_what_is_left_where_dp_shard_is_typed() -> None:
    assert filled(DegreesConfig(dp_replicate="auto", dp_shard=2, tp=2), 16).dp_replicate == 4
    assert filled(DegreesConfig(dp_replicate="auto", tp=2), 16) == ParallelDims(dp_shard=8, tp=2)


def test_a_world_that_the_given_degrees_do_not_divide() -> None:
    with pytest.raises(UserError) as refused:
        filled(DegreesConfig(pp=3, tp=2), 8)
    assert str(refused.value) == (
        "parallel.degrees: pp=3 x dp_replicate=1 x cp=1 x tp=2 leaves no whole dp_shard "
        "of a world of 8 ranks\n"
        "nearest worlds (launch.nproc x launch.nnodes) that work: 6, 12"
    )


def test_a_product_that_is_not_the_world() -> None:
    with pytest.raises(UserError) as refused:
        filled(DegreesConfig(dp_shard=2, tp=2), 16)
    assert str(refused.value) == (
        "parallel.degrees: pp=1 x dp_replicate=1 x dp_shard=2 x cp=1 x tp=2 is 4 ranks, "
        "but the world has 16\n"
        "parallel.degrees.dp_shard=8 works (null fills it in), or "
        "a world (launch.nproc x launch.nnodes) of 4 works"
    )
    with pytest.raises(UserError, match="nnodes\\) of 12 works") as refused:
        filled(DegreesConfig(dp_shard=3, tp=4), 16 + 1)
    assert "null fills it in" not in str(refused.value)
    with pytest.raises(UserError, match="give other degrees"):  # no dp_shard mends tp=3
        filled(DegreesConfig(dp_shard=3, tp=3), 16)


@pytest.mark.parametrize(
    "typed", ["", "parallel=hsdp parallel.degrees.dp_shard=5", "parallel.degrees.dp_shard=7"]
)
@pytest.mark.parametrize("world", [2, 6, 100])
def test_each_dp_shard_and_world_that_a_refusal_names_works(
    planned: PlannedCommand, typed: str, world: int
) -> None:
    refused = planned.run(*typed.split(), "hardware=cpu", f"launch.nproc={world}")
    assert refused.code == 2, refused.err
    message = refused.err.splitlines()[-1]
    fixes = message.split(", or ")
    assert fixes
    for fix in fixes:
        number = re.search(r"(?:nnodes\) of|one of) (\d+)", fix)
        degrees = re.findall(r"parallel\S*=\S+", fix)
        nproc = number[1] if number else world
        assert planned.run(*typed.split(), "hardware=cpu", f"launch.nproc={nproc}", *degrees).code == 0, fix


def test_ep_is_the_largest_that_divides_ranks_and_experts() -> None:
    assert filled(DegreesConfig(ep="auto"), 8).ep == 8
    assert filled(DegreesConfig(ep="auto", dp_shard=3, cp=2), 6).ep == 2
    assert filled(DegreesConfig(ep="auto", pp=2, dp_replicate=2), 32).ep == 8
    assert filled(DegreesConfig(ep="auto"), 1024).ep == 64
    assert filled(DegreesConfig(ep="auto"), 1).ep == 1


def test_tp_is_the_largest_within_a_node_that_divides_every_width() -> None:
    assert filled(DegreesConfig(tp="auto"), 64) == ParallelDims(dp_shard=8, tp=8)
    assert filled(DegreesConfig(tp="auto", cp=2), 12) == ParallelDims(dp_shard=3, tp=2, cp=2)
    # 10,944 = 8 x 1,368, but 12 heads have no 8.
    heads = replace(MODEL, attention=replace(MODEL.attention, heads=12))
    assert filled(DegreesConfig(tp="auto"), 8, heads).tp == 4
    assert filled(DegreesConfig(tp="auto"), 8, replace(MODEL, dense_hidden_dim=10_946)).tp == 2
    assert filled(DegreesConfig(tp="auto"), 8, length=4098).tp == 2


def test_cp_leaves_a_rank_at_most_8192_tokens_where_it_can() -> None:
    lengths = {4096: 1, 8192: 1, 8193: 1, 16384: 2, 40960: 8, 131072: 8}
    assert {length: filled(DegreesConfig(cp="auto"), 8, length=length).cp for length in lengths} == lengths
    assert filled(DegreesConfig(cp="auto"), 6, length=131072).cp == 2


def test_pp_leaves_a_stage_at_most_256_ranks() -> None:
    worlds = {8: 1, 256: 1, 512: 2, 2048: 8, 768: 3}
    assert {world: filled(DegreesConfig(pp="auto"), world, V3).pp for world in worlds} == worlds
    assert filled(DegreesConfig(pp="auto", tp=8), 512, V3) == ParallelDims(pp=2, dp_shard=32, tp=8)


def test_all_at_once() -> None:
    assert filled(AUTO, 1024, V3, 32768) == ParallelDims(pp=4, dp_shard=8, cp=4, tp=8, ep=256)
    assert filled(AUTO, 1, V3) == ParallelDims()
