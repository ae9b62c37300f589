from dataclasses import replace

import pytest

from dsv3.parallel.degrees import Degrees, DegreesConfig, check_batch, check_model, fill, resolve
from dsv3.runtime.errors import InvalidValue, UserError
from tests.planning.presets import preset

MODEL = preset("16b")


def refusal(degrees: Degrees, sequence: int = 4096, batch: int = 3072, microbatch: int = 1) -> str:
    def check() -> None:
        check_model(degrees, MODEL)
        check_batch(degrees, sequence, batch, microbatch)

    with pytest.raises(UserError) as refused:
        check()
    assert len(str(refused.value).splitlines()) <= 2
    return str(refused.value)


def test_dp_shard_takes_what_is_left_and_the_others_are_one() -> None:
    degrees = resolve(DegreesConfig(tp=2, pp=3, ep=8), 48, MODEL, 4096, 64, 2)
    assert degrees == Degrees(pp=3, dp_replicate=1, dp_shard=8, cp=1, tp=2, ep=8)
    assert degrees.world_size == 48
    assert (degrees.dense_shards, degrees.expert_shards, degrees.data_parallel) == (8, 2, 8)
    assert list(degrees.to_json()) == ["pp", "dp_replicate", "dp_shard", "cp", "tp", "ep"]


def test_resolve_checks_the_model_and_the_batch_too() -> None:
    with pytest.raises(UserError, match=r"degrees\.tp=3"):
        resolve(DegreesConfig(tp=3), 3, MODEL, 4096, 3, 1)
    with pytest.raises(UserError, match="global_batch_size=3"):
        resolve(DegreesConfig(), 2, MODEL, 4096, 3, 1)


def test_full_layout_of_16_and_of_32_ranks() -> None:
    full = DegreesConfig(pp=2, cp=2, tp=2, ep=4)
    assert resolve(full, 16, MODEL, 4096, 4, 2).dp_shard == 2
    assert resolve(replace(full, dp_replicate=2), 32, MODEL, 4096, 8, 2).dp_shard == 2


def test_a_world_that_the_given_degrees_do_not_divide() -> None:
    with pytest.raises(UserError) as refused:
        fill(DegreesConfig(pp=3, tp=2), 8)
    assert str(refused.value) == (
        "parallel.degrees: pp=3 x dp_replicate=1 x cp=1 x tp=2 leaves no whole dp_shard "
        "of a world of 8 ranks\n"
        "nearest worlds (launch.nproc x launch.nnodes) that work: 6, 12"
    )


def test_a_product_that_is_not_the_world() -> None:
    with pytest.raises(UserError) as refused:
        fill(DegreesConfig(dp_shard=2, tp=2), 16)
    assert str(refused.value) == (
        "parallel.degrees: pp=1 x dp_replicate=1 x dp_shard=2 x cp=1 x tp=2 is 4 ranks, "
        "but the world has 16\n"
        "parallel.degrees.dp_shard=8 works (null fills it in), or "
        "a world (launch.nproc x launch.nnodes) of 4 works"
    )
    with pytest.raises(UserError, match="nnodes\\) of 9 works") as refused:
        fill(DegreesConfig(dp_shard=3, tp=3), 16)
    assert "null fills it in" not in str(refused.value)


def test_heads_and_vocabulary_divide_by_tp() -> None:
    assert refusal(Degrees(tp=3)) == (
        "parallel.degrees.tp=3 does not divide model.attention.heads=16; nearest that work: 2, 4"
    )
    assert "nearest that work: 16" in refusal(Degrees(tp=32))
    odd = replace(MODEL, vocab_size=102_402)
    with pytest.raises(UserError, match=r"tp=4 does not divide model\.vocab_size=102402; .* work: 2$"):
        check_model(Degrees(tp=4), odd)


def test_ep_divides_the_ranks_of_a_stage_and_the_experts() -> None:
    assert refusal(Degrees(dp_shard=8, ep=3)) == (
        "parallel.degrees.ep=3 does not divide dp_shard x cp x tp=8; nearest that work: 2, 4"
    )
    assert refusal(Degrees(dp_shard=3, cp=4, ep=12)) == (
        "parallel.degrees.ep=12 does not divide model.moe.num_experts=64; nearest that work: 4"
    )
    check_model(Degrees(dp_shard=2, cp=2, tp=2, ep=8), MODEL)
    assert "dp_shard x cp x tp=2;" in refusal(Degrees(dp_replicate=2, dp_shard=2, ep=4))


def test_a_stage_has_a_layer() -> None:
    assert refusal(Degrees(pp=28)) == (
        "parallel.degrees.pp=28 has more stages than model.num_layers=27: at most 27"
    )
    check_model(Degrees(pp=27), MODEL)


def test_sequences_split_over_cp_in_zigzag_and_over_tp() -> None:
    assert refusal(Degrees(cp=3), sequence=1000) == (
        "train.sequence_length=1000 is not a multiple of 6 (2 x parallel.degrees.cp=3); "
        "nearest that work: 996, 1002"
    )
    assert refusal(Degrees(cp=2, tp=8), sequence=1004) == (
        "train.sequence_length=1004 is not a multiple of 16 (cp=2 x parallel.degrees.tp=8); "
        "nearest that work: 992, 1008"
    )
    # 1,005 breaks both laws; the values told satisfy both.
    assert "nearest that work: 992, 1008" in refusal(Degrees(cp=2, tp=8), sequence=1005)
    check_batch(Degrees(), 1001, 1, 1)


def test_the_global_batch_is_whole_microbatches_a_rank() -> None:
    assert refusal(Degrees(dp_replicate=2, dp_shard=4), batch=40, microbatch=2) == (
        "train.global_batch_size=40 is not a multiple of 16 (train.microbatch_size=2 x dp_replicate=2 "
        "x dp_shard=4); nearest that work: 32, 48"
    )
    assert "nearest that work: 8" in refusal(Degrees(dp_shard=8), batch=3)


def test_degrees_are_above_zero() -> None:
    DegreesConfig(pp=1, ep=2).validate()
    with pytest.raises(InvalidValue, match=r"^tp=0 is not possible"):
        DegreesConfig(tp=0).validate()
