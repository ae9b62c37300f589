"""Each law with its message: key, numbers, and nearest values, which must work."""

from dataclasses import replace

import pytest

from dsv3.config.parallel import DegreesConfig, ParallelConfig, PipelineConfig, Schedule
from dsv3.errors import InvalidValue, UserError
from dsv3.planning.batch_schedule import BatchSchedule
from dsv3.planning.layout import (
    ParallelDims,
    check_batch,
    check_model,
    check_schedule,
    check_sequence,
    check_stages,
    check_wrappers,
    resolve_degrees,
)
from tests.planning.presets import preset

MODEL = preset("16b")
ANY = ParallelConfig()
BARE = ParallelConfig(fsdp=None, tensor=None, expert=None, context=None, pipeline=None)


def refusal(degrees: ParallelDims, sequence: int = 4096, batch: int = 3072, microbatch: int = 1) -> str:
    def check() -> None:
        check_model(degrees, MODEL)
        check_stages(ANY, degrees, MODEL)
        check_sequence(degrees, sequence)
        check_batch(ANY, degrees, BatchSchedule(batch), microbatch)

    with pytest.raises(UserError) as refused:
        check()
    assert len(str(refused.value).splitlines()) <= 2
    return str(refused.value)


def test_resolved_degrees_are_checked() -> None:
    full = ParallelConfig(degrees=DegreesConfig(pp=2, dp_shard=2, cp=2, tp=2, ep=4))
    assert resolve_degrees(full, 16, MODEL, 4096) == ParallelDims(2, 1, 2, 2, 2, 4)
    twice = replace(full, degrees=replace(full.degrees, dp_replicate=2))
    assert resolve_degrees(twice, 32, MODEL, 4096).dp_replicate == 2
    with pytest.raises(UserError, match=r"degrees\.tp=3"):
        resolve_degrees(ParallelConfig(degrees=DegreesConfig(tp=3)), 3, MODEL, 4096)
    with pytest.raises(UserError, match=r"degrees\.pp=28"):
        resolve_degrees(ParallelConfig(degrees=DegreesConfig(pp=28)), 28, MODEL, 4096)


def test_heads_vocabulary_and_dense_width_divide_by_tp() -> None:
    assert refusal(ParallelDims(tp=3)) == (
        "parallel.degrees.tp=3 does not divide model.attention.heads=16; nearest that work: 2, 4"
    )
    assert "nearest that work: 16" in refusal(ParallelDims(tp=32))
    odd = replace(MODEL, vocab_size=102_402)
    with pytest.raises(UserError, match=r"tp=4 does not divide model\.vocab_size=102402; .* work: 2$"):
        check_model(ParallelDims(tp=4), odd)
    narrow = replace(MODEL, dense_hidden_dim=10_946)
    with pytest.raises(UserError, match=r"tp=4 does not divide model\.dense_hidden_dim=10946; .* work: 2$"):
        check_model(ParallelDims(tp=4), narrow)
    check_model(ParallelDims(tp=4), replace(narrow, num_dense_layers=0))


def test_ep_divides_the_ranks_of_a_stage_and_the_experts() -> None:
    assert refusal(ParallelDims(dp_shard=8, ep=3)) == (
        "parallel.degrees.ep=3 does not divide dp_shard x cp x tp=8; nearest that work: 2, 4"
    )
    assert refusal(ParallelDims(dp_shard=3, cp=4, ep=12)) == (
        "parallel.degrees.ep=12 does not divide model.moe.num_experts=64; nearest that work: 4"
    )
    check_model(ParallelDims(dp_shard=2, cp=2, tp=2, ep=8), MODEL)
    assert "dp_shard x cp x tp=2;" in refusal(ParallelDims(dp_replicate=2, dp_shard=2, ep=4))


def test_experts_are_cut_in_equal_parts_where_there_are_more_shards_than_experts() -> None:
    with pytest.raises(UserError) as refused:
        check_model(ParallelDims(dp_shard=320, ep=32), preset("236b"))
    assert str(refused.value) == (
        "parallel.degrees.ep=32 cuts 5 experts into 10 shards, which do not divide "
        "2 x model.moe.hidden_dim=3072 and model.dim=5120\n"
        "nearest that work: 20, 40; or raise dp_replicate"
    )
    check_model(ParallelDims(dp_shard=320, ep=20), preset("236b"))
    assert "no value works; or raise dp_replicate" in refusal(ParallelDims(dp_shard=96, ep=32))
    check_model(ParallelDims(dp_replicate=2, dp_shard=48, ep=16), MODEL)


def test_a_stage_has_a_layer() -> None:
    assert refusal(ParallelDims(pp=28)) == (
        "parallel.degrees.pp=28 has more stages than model.num_layers=27: at most 27"
    )
    check_stages(ANY, ParallelDims(pp=27), MODEL)
    interleaved = ParallelConfig(schedule=Schedule.Interleaved1F1B)
    with pytest.raises(UserError, match=r"28 pipeline stages .* model\.num_layers=27: .*stages_per_rank"):
        check_stages(interleaved, ParallelDims(pp=14), MODEL)
    typed = ParallelConfig(pipeline=PipelineConfig(split=[30]))
    with pytest.raises(UserError, match=r"parallel\.pipeline\.split=\[30\]"):
        check_stages(typed, ParallelDims(pp=2), MODEL)
    check_stages(typed, ParallelDims(), MODEL)


def test_a_schedule_that_keeps_parameters_is_not_told_to_free_them() -> None:
    both = ParallelConfig(schedule=Schedule.DualPipeV, reshard_after_forward=True)
    check_stages(both, ParallelDims(), MODEL)
    with pytest.raises(UserError, match="gives wrong gradients"):
        check_stages(both, ParallelDims(pp=2), MODEL)


@pytest.mark.parametrize(
    ("axis", "wrapper"), [("pp", "pipeline"), ("cp", "context"), ("tp", "tensor"), ("ep", "expert")]
)
def test_a_degree_needs_what_carries_it_out(axis: str, wrapper: str) -> None:
    degrees, without = replace(ParallelDims(dp_shard=2), **{axis: 2}), replace(ANY)
    check_wrappers(without, degrees)
    setattr(without, wrapper, None)
    with pytest.raises(UserError) as refused:
        check_wrappers(without, degrees)
    assert str(refused.value).startswith(f"parallel.degrees.{axis}=2 needs parallel.{wrapper}, which is null")
    assert "take parallel=" in str(refused.value)


def test_every_world_of_several_ranks_needs_fsdp() -> None:
    check_wrappers(BARE, ParallelDims())
    with pytest.raises(UserError, match=r"2 data-parallel ranks of 2 need parallel\.fsdp, .* parallel=fsdp"):
        check_wrappers(BARE, ParallelDims(dp_shard=2))
    with pytest.raises(UserError, match=r"1 data-parallel ranks of 2 need parallel\.fsdp"):
        check_wrappers(replace(ANY, fsdp=None), ParallelDims(tp=2))


def test_sequences_split_over_cp_in_zigzag_and_over_tp() -> None:
    assert refusal(ParallelDims(cp=3), sequence=1000) == (
        "train.sequence_length=1000 is not a multiple of 6 (2 x parallel.degrees.cp=3); "
        "nearest that work: 996, 1002"
    )
    assert refusal(ParallelDims(cp=2, tp=8), sequence=1004) == (
        "train.sequence_length=1004 is not a multiple of 16 (cp=2 x parallel.degrees.tp=8); "
        "nearest that work: 992, 1008"
    )
    # 1,005 breaks both laws; the values told satisfy both.
    assert "nearest that work: 992, 1008" in refusal(ParallelDims(cp=2, tp=8), sequence=1005)
    check_sequence(ParallelDims(), 1001)


def test_the_global_batch_is_whole_microbatches_a_rank() -> None:
    assert refusal(ParallelDims(dp_replicate=2, dp_shard=4), batch=40, microbatch=2) == (
        "train.global_batch_size=40 is not a multiple of 16 (train.microbatch_size=2 x dp_replicate=2 "
        "x dp_shard=4); nearest that work: 32, 48"
    )
    assert "nearest that work: 8" in refusal(ParallelDims(dp_shard=8), batch=3)


def test_a_schedule_has_the_microbatches_that_it_needs() -> None:
    check_schedule(ANY, ParallelDims(pp=4, dp_shard=2), 16, 2)
    check_schedule(ANY, ParallelDims(dp_shard=2), 2, 1)
    with pytest.raises(UserError, match=r"1F1B on 4 stages .* 2 microbatches a step\n.*batch_size=16 or"):
        check_schedule(ANY, ParallelDims(pp=4, dp_shard=2), 8, 2)
    v = ParallelConfig(schedule=Schedule.DualPipeV)
    with pytest.raises(UserError, match=r"DualPipeV on 8 stages \(pp=4 x 2\).*\n.* work: 8, by"):
        check_schedule(v, ParallelDims(pp=4), 4, 1)


def test_a_layout_is_made_for_a_world() -> None:
    with pytest.raises(InvalidValue, match="min_world_size=0"):
        ParallelConfig(min_world_size=0).validate()
