"""Closed forms again, from the description of docs/parallelism.md and small numbers."""

from dataclasses import replace

import pytest

from dsv3.config.parallel import RecomputeMode, SavedOp, Schedule
from dsv3.planning import parameters
from dsv3.planning.dispatch_volume import dispatch_levels
from dsv3.planning.layout import ParallelDims
from dsv3.planning.parameters import Component
from dsv3.planning.pipeline_stages import PipelineShape
from dsv3.planning.step_shape import FP8Shape, StateBytes, StepShape
from dsv3.planning.traffic import TrafficBytes, pipeline_traffic, rank_traffic
from tests.planning.presets import count, preset

# 32 numbers a norm, 4 layers of which 1 dense, 1 MTP depth.
DEBUG = preset("debug")
STEP = StepShape(2, 256, microbatches=3)
BF16 = replace(STEP, state=StateBytes(compute=2))
TOKENS = 2 * 256


def test_one_process_sends_nothing() -> None:
    assert rank_traffic(DEBUG, ParallelDims(), STEP) == TrafficBytes()


def test_fsdp_gathers_twice_and_scatters_once_a_microbatch_but_the_root_once() -> None:
    counts = count(DEBUG)
    mtp_join = sum(w.numel for w in parameters.mtp_join(DEBUG))
    root = counts.embedding + counts.head + 128 + mtp_join
    blocks = counts.total - root
    found = rank_traffic(DEBUG, ParallelDims(dp_shard=4), STEP)
    assert found.dp == pytest.approx(3 * 3 / 4 * 4 * (2 * root + 3 * blocks), rel=1e-9)
    assert found == TrafficBytes(dp=found.dp)
    kept = rank_traffic(DEBUG, ParallelDims(dp_shard=4), replace(STEP, reshard_after_forward=False))
    assert kept.dp == pytest.approx(3 * 3 / 4 * 4 * 2 * (root + blocks), rel=1e-9)


def test_in_bf16_norms_and_routers_still_travel_in_fp32_and_so_do_gradients() -> None:
    counts = count(DEBUG)
    module = parameters.mtp_modules(DEBUG)[0]
    fp32 = counts.norms + counts.router
    fp32 += sum(w.numel for w in module if w.component in (Component.norms, Component.router))
    kept = replace(BF16, reshard_after_forward=False)
    gathered = 2 * (counts.total - fp32) + 4 * fp32
    assert rank_traffic(DEBUG, ParallelDims(dp_shard=2), kept).dp == 3 * (gathered + 4 * counts.total) // 2


def test_uneven_shards_travel_at_the_length_of_the_longest() -> None:
    odd = replace(DEBUG, vocab_size=4097)
    rows = (4100 - 4096) * 128 * 2  # embedding and head, a row more on each of 4 ranks
    more = (
        rank_traffic(odd, ParallelDims(dp_shard=4), STEP).dp
        - rank_traffic(DEBUG, ParallelDims(dp_shard=4), STEP).dp
    )
    assert more == 3 * 2 * 4 * rows * 3 // 4


def test_replicas_sum_the_gradients_of_their_shards() -> None:
    found = rank_traffic(DEBUG, ParallelDims(dp_replicate=4, dp_shard=2), STEP)
    assert found.dp_replicate == 3 * 2 * 3 * parameters.total(DEBUG) // 2
    assert found.dp == rank_traffic(DEBUG, ParallelDims(dp_shard=2), STEP).dp


def test_a_depth_of_mtp_gathers_and_reduces_its_own_weights_and_the_head_no_more_often() -> None:
    def dp(depths: int, degrees: ParallelDims) -> int:
        shape = replace(STEP, microbatches=2, reshard_after_forward=False)
        return rank_traffic(replace(DEBUG, mtp_depths=depths), degrees, shape).dp

    depth = sum(w.numel for w in parameters.mtp_modules(DEBUG)[0])
    assert dp(2, ParallelDims(dp_shard=2)) - dp(1, ParallelDims(dp_shard=2)) == 2 * 2 * 4 * depth // 2
    split = sum(w.numel for w in parameters.mtp_modules(DEBUG)[0] if w.tensor_dim is not None)
    # What is whole lies in 4 shards, what is split in 2 of its halves.
    expected = 2 * 2 * 4 * ((depth - split) * 3 // 4 + split // 2 // 2)
    tp = ParallelDims(dp_shard=2, tp=2, ep=1)
    assert dp(2, tp) - dp(1, tp) == expected


def test_tp_gathers_latents_and_scatters_sums_both_ways() -> None:
    layer = 96 + 64 + 16 + 128
    ends = 2 * (128 + 128)  # embedding and head, for the next token and for MTP
    loss = 4 * 2 * 3  # three numbers of each of 4 ranks, for two predictions
    numbers = 2 * (5 * layer + 2 * 128 + ends) + loss
    found = rank_traffic(DEBUG, ParallelDims(tp=4), STEP)
    assert found.tp == 3 * TOKENS * numbers * 4 * 3 // 4
    again = rank_traffic(DEBUG, ParallelDims(tp=4), replace(STEP, recompute=RecomputeMode.full))
    assert again.tp - found.tp == 3 * TOKENS * (5 * layer + 128) * 4 * 3 // 4
    halved = rank_traffic(DEBUG, ParallelDims(tp=4, cp=2), STEP)
    assert 2 * halved.tp == found.tp


def test_without_a_latent_of_queries_the_hidden_states_are_gathered() -> None:
    direct = replace(DEBUG, attention=replace(DEBUG.attention, q_lora_rank=None))
    more = (
        rank_traffic(direct, ParallelDims(tp=2), STEP).tp - rank_traffic(DEBUG, ParallelDims(tp=2), STEP).tp
    )
    assert more == 3 * TOKENS * 5 * (128 - 96) * 2 * 4 // 2


def test_cp_gathers_the_latents_of_keys_and_values_of_a_row() -> None:
    found = rank_traffic(DEBUG, ParallelDims(cp=4, tp=2), BF16)
    assert found.cp == 3 * 5 * 2 * TOKENS * (64 + 16) * 2 * 3 // 4
    # DESIGN section 7: 576 numbers a token instead of the heads' 32,832 by a ring.
    v3, step = preset("671b"), StepShape(1, 8192, state=StateBytes(compute=2))
    assert rank_traffic(v3, ParallelDims(cp=2), step).cp == 62 * 2 * 8192 * 576 * 2 // 2


def test_ep_sends_a_row_to_each_other_rank_and_one_back() -> None:
    (level,) = dispatch_levels(DEBUG.moe, 4, None)
    row, behind = 4 * 128, 2 * 4 * 4
    found = rank_traffic(DEBUG, ParallelDims(dp_shard=2, tp=2, ep=4), STEP)
    per_layer = TOKENS / 2 * level.sent * 2 * (2 * row + behind)
    assert found.ep == pytest.approx(3 * 4 * per_layer, abs=12)
    assert level.sent == pytest.approx(3 / 4 * level.rows)
    for keep, times in (((SavedOp.exchange,), 2), ((), 3)):
        shape = replace(STEP, recompute=RecomputeMode.selective, keep=keep)
        again = rank_traffic(DEBUG, ParallelDims(dp_shard=2, tp=2, ep=4), shape)
        assert again.ep == pytest.approx(found.ep * times / 2, abs=12)


def test_ep_across_nodes_adds_up_two_levels() -> None:
    config = preset("671b")
    shape = StepShape(1, 4096, state=StateBytes(compute=2), ranks_per_node=8)
    between, within = dispatch_levels(config.moe, 64, 8)
    row = 2 * 7168
    numbers = between.sent * (2 * row + 2 * 4 * 32) + within.sent * (2 * row + 2 * 4 * 4)
    assert rank_traffic(config, ParallelDims(dp_shard=64, ep=64), shape).ep == pytest.approx(
        59 * 4096 * 2 * numbers, rel=1e-6
    )


def pipelined(schedule: Schedule, per_rank: int, pp: int = 2) -> list[TrafficBytes]:
    shape = replace(STEP, microbatches=4, pipelining=PipelineShape(schedule, per_rank))
    return pipeline_traffic(DEBUG, ParallelDims(pp=pp), shape)


def test_stages_send_hidden_states_on_and_gradients_back() -> None:
    boundary, copy = 4 * TOKENS * 128 * 4, 4096 * 128 * 4
    assert [sent.pp for sent in pipelined(Schedule["1F1B"], 1)] == [boundary + copy] * 2
    assert [sent.pp for sent in pipelined(Schedule["1F1B"], 1, 4)] == [
        boundary + copy,
        2 * boundary,
        2 * boundary,
        boundary + copy,
    ]
    assert [sent.pp for sent in pipelined(Schedule.Interleaved1F1B, 2)] == [3 * boundary + copy] * 2
    # In a V the two stages at its foot share a rank, and so do the two embeddings.
    assert [sent.pp for sent in pipelined(Schedule.ZBVZeroBubble, 2)] == [2 * boundary] * 2


def test_a_pipeline_gathers_what_its_forward_passes_free_and_scatters_once() -> None:
    def dp(schedule: str, reshard: bool, rank: int) -> float:
        shape = replace(STEP, microbatches=4, reshard_after_forward=reshard)
        shape = replace(shape, pipelining=PipelineShape(Schedule[schedule], 1, (2,)))
        return pipeline_traffic(DEBUG, ParallelDims(pp=2, dp_shard=2), shape)[rank].dp

    root = 2 * 4096 * 128 + 128 + sum(w.numel for w in parameters.mtp_join(DEBUG))
    blocks = 3 * sum(w.numel for w in parameters.block(DEBUG, dense=False))
    # The last rank: F B F B F B F B. Each backward pass gathers what the forward pass before it has freed.
    for reshard, gathers in ((True, 5), (False, 1)):
        assert dp("1F1B", reshard, 1) == 4 * ((1 + 1) * root + (gathers + 1) * blocks) // 2
    assert dp("GPipe", True, 1) == dp("1F1B", True, 1)
    assert dp("1F1B", True, 0) == dp("GPipe", True, 0) > dp("1F1B", False, 0)


def test_the_rank_that_sends_most_is_told_and_json_has_every_axis() -> None:
    shape = replace(STEP, microbatches=4, pipelining=PipelineShape(Schedule["1F1B"], 1))
    degrees = ParallelDims(pp=2, dp_replicate=2, dp_shard=2, cp=2, tp=2, ep=4)
    every = pipeline_traffic(DEBUG, degrees, shape)
    found = rank_traffic(DEBUG, degrees, shape)
    assert found.total == max(sent.total for sent in every) > min(sent.total for sent in every)
    told = found.to_json()
    assert list(told) == ["dp", "dp_replicate", "tp", "cp", "ep", "pp", "total"]
    assert told.pop("total") == sum(told.values())
    assert min(told.values()) > 0


def test_rows_that_go_to_experts_in_fp8_are_a_byte_a_number_and_a_scale_a_tile() -> None:
    (level,) = dispatch_levels(DEBUG.moe, 4, None)
    degrees, shape = ParallelDims(dp_shard=2, tp=2, ep=4), replace(BF16, fp8=FP8Shape(dispatch=True))
    there, back, behind = 128 + 4, 2 * 128, 2 * 4 * 4
    per_layer = TOKENS / 2 * level.sent * 2 * (there + back + behind)
    assert rank_traffic(DEBUG, degrees, shape).ep == pytest.approx(3 * 4 * per_layer, abs=12)
    plain = replace(BF16, fp8=FP8Shape())
    assert rank_traffic(DEBUG, degrees, plain) == rank_traffic(DEBUG, degrees, BF16)


def test_weights_gathered_in_fp8_are_a_byte_a_number_where_shards_hold_whole_blocks() -> None:
    kept = replace(BF16, reshard_after_forward=False)
    shape = replace(kept, fp8=FP8Shape(gather=True))
    bf16, fp8 = (rank_traffic(DEBUG, ParallelDims(dp_shard=2), step).dp for step in (kept, shape))
    # Of 128 or 256 rows in each of 2 shards: experts (their own 128), dense gate and up, the shared
    # experts have 64, and so do down projections, o_proj and MTP's; q_b_proj 96 and kv_b_proj 128.
    experts = 4 * 16 * (256 * 128 + 128 * 128)
    others = 2 * 512 * 128 + 5 * 256 * 64
    blocks = 4 * 16 * (2 + 1) + 2 * 4 + 5 * 2
    assert bf16 - fp8 == 3 * (experts + others - 4 * blocks) // 2
