from dataclasses import replace

import pytest

from dsv3.config.parallel import RecomputeMode, SavedOp, Schedule
from dsv3.planning import parameters
from dsv3.planning.activations import Activations
from dsv3.planning.layout import ParallelDims
from dsv3.planning.memory import _pinned_state, pipeline_memory, rank_memory
from dsv3.planning.parameters import Component, Weight
from dsv3.planning.pipeline_stages import PipelineShape, build_stages, stage_weights
from dsv3.planning.sharding import local_shape, shard_count, shard_numel
from dsv3.planning.step_peak import most_in_flight
from dsv3.planning.step_shape import FP8Shape, StateBytes, StepShape
from tests.planning.presets import NAMES, count, preset

STEP = StepShape(microbatch_size=1, sequence_length=4096, microbatches=2)
"""In a second microbatch all gradients are there."""
BF16 = replace(STEP, state=StateBytes(compute=2))


@pytest.mark.parametrize("name", NAMES)
def test_one_process_holds_sixteen_bytes_a_parameter_and_gradients_on_their_way(name: str) -> None:
    config = preset(name)
    memory = rank_memory(config, ParallelDims(), STEP)
    count = parameters.total(config)
    assert (memory.parameters, memory.gradients, memory.optimizer) == (4 * count, 4 * count, 8 * count)
    assert memory.total == 16 * count + memory.activations + memory.weight_copies
    # Of the head, or of a stack of experts with what MTP has looked up in the embedding.
    stack = 2 * config.moe.num_experts * config.dim * config.moe.hidden_dim
    table = config.vocab_size * config.dim
    assert memory.weight_copies in (4 * table, 4 * stack // 2, 4 * stack, 4 * (stack + table))


@pytest.mark.parametrize(
    "degrees",
    [
        ParallelDims(dp_shard=2048, ep=64),
        ParallelDims(dp_shard=256, tp=8, ep=256),
        ParallelDims(dp_shard=100, cp=3, tp=2, ep=2),
        ParallelDims(dp_shard=6, ep=4, tp=4),
    ],
    ids=str,
)
def test_the_shards_of_every_weight_add_up_to_the_whole(degrees: ParallelDims) -> None:
    config = preset("671b")
    for weight in {*parameters.main_model(config), *parameters.mtp_modules(config)[0]}:
        shards = shard_count(weight, degrees)
        held = sum(shard_numel(weight, degrees, shard) for shard in range(shards))
        parts = {Component.experts: degrees.ep}.get(weight.component, degrees.tp if _split(weight) else 1)
        assert held * parts == weight.numel
        assert shard_numel(weight, degrees) == max(
            shard_numel(weight, degrees, shard) for shard in range(shards)
        )


def _split(weight: Weight) -> bool:
    return weight.tensor_dim is not None


def test_671b_over_2048_ranks_is_the_whole_but_for_rounding_up() -> None:
    config, degrees = preset("671b"), ParallelDims(dp_shard=2048, ep=64)
    whole = 16 * parameters.total(config)
    memory = rank_memory(config, degrees, BF16)
    held = 2048 * (memory.parameters + memory.gradients + memory.optimizer)
    assert whole <= held < 1.005 * whole


def test_an_even_layout_loses_nothing() -> None:
    config, degrees = preset("671b"), ParallelDims(dp_replicate=32, dp_shard=64, ep=64)
    memory = rank_memory(config, degrees, BF16)
    assert 64 * memory.parameters == 4 * parameters.total(config)


def test_uneven_shards_round_up_by_whole_rows() -> None:
    weight = Weight(Component.attention, (10, 7))
    assert [shard_numel(weight, ParallelDims(dp_shard=4), shard) for shard in range(4)] == [21, 21, 21, 7]
    assert [shard_numel(weight, ParallelDims(dp_shard=16), shard) for shard in (0, 9, 10)] == [7, 7, 0]


def test_experts_are_cut_by_expert_and_beyond_that_by_row() -> None:
    stack = Weight(Component.experts, (8, 6, 5))
    assert shard_numel(stack, ParallelDims(dp_shard=4, tp=2)) == 6 * 5
    assert shard_numel(stack, ParallelDims(dp_shard=16, ep=8)) == 3 * 5
    assert shard_numel(stack, ParallelDims(dp_replicate=2, dp_shard=4, ep=4)) == 2 * 6 * 5


def test_tensor_parallelism_splits_the_matrices_with_heads_and_leaves_the_norms() -> None:
    assert local_shape(Weight(Component.attention, (12, 5), 0), ParallelDims(tp=4)) == (3, 5)
    assert local_shape(Weight(Component.attention, (5, 12), 1), ParallelDims(tp=4)) == (5, 3)
    assert local_shape(Weight(Component.norms, (12,)), ParallelDims(tp=4)) == (12,)


def test_tp_splits_what_has_heads_and_shards_the_rest_over_its_ranks_too() -> None:
    config, two = preset("671b"), ParallelDims(tp=2, dp_shard=4)
    every = [*parameters.embedding(config), *parameters.output(config), *parameters.block(config, dense=True)]
    assert sum(shard_numel(w, two) for w in every) == sum(w.numel for w in every) // 8
    assert {shard_count(w, two) for w in every if _split(w)} == {4}
    assert {shard_count(w, two) for w in every if not _split(w)} == {8}
    whole = [w for w in parameters.block(config, dense=False) if local_shape(w, two) == w.shape]
    # Norms, router, q_a_proj, kv_a_proj, experts (ep is 1) and shared experts.
    assert len(whole) == 4 + 1 + 2 + 2 + 3


def test_stages_hold_embedding_first_and_head_and_mtp_last() -> None:
    config = preset("671b")
    split = build_stages(config, 16)
    assert [len(stage.dense) for stage in split] == [4] * 15 + [1]
    assert split[0].dense == (True, True, True, False)
    assert [stage.mtp_depths for stage in split] == [0] * 15 + [1]
    held = [{w.component for group in stage_weights(config, stage) for w in group} for stage in split]
    assert [n for n, kinds in enumerate(held) if Component.embedding in kinds] == [0, 15]
    assert [n for n, kinds in enumerate(held) if Component.head in kinds] == [15]
    numbers = sum(w.numel for stage in split for group in stage_weights(config, stage) for w in group)
    # The last stage's copy of the embedding, which its MTP depth reads.
    assert numbers == parameters.total(config) + count(config).embedding
    assert [len(stage.dense) for stage in build_stages(config, 3, [1, 60])] == [1, 59, 1]


def test_a_v_holds_both_ends_and_the_copy_of_the_embedding() -> None:
    config, degrees = preset("debug"), ParallelDims(pp=2)
    v = replace(STEP, microbatches=4, pipelining=PipelineShape(Schedule.DualPipeV, 2))
    ends, middle = (memory.parameters for memory in pipeline_memory(config, degrees, v))
    counts = count(config)
    assert ends + middle == 4 * (counts.total + counts.embedding)
    assert ends > 4 * (2 * counts.embedding + counts.head + counts.mtp)


def test_the_worst_rank_is_reported() -> None:
    config, degrees = preset("671b"), ParallelDims(pp=16, dp_shard=128, ep=64)
    shape = replace(BF16, microbatches=16)
    every = [memory.total for memory in pipeline_memory(config, degrees, shape)]
    assert rank_memory(config, degrees, shape).total == max(every) > min(every)


def kept_microbatches(schedule: Schedule, per_rank: int, microbatches: int, pp: int = 4) -> list[int]:
    """How many microbatches' activations each rank holds of one of its stages, at the most."""
    config = replace(preset("236b"), num_layers=pp * per_rank, num_dense_layers=0)
    split = tuple(range(1, pp * per_rank))
    shape = replace(STEP, microbatches=microbatches, pipelining=PipelineShape(schedule, per_rank, split))
    degrees = ParallelDims(pp=pp)
    held = shape.stages_of_ranks(config, degrees)
    return [
        most_in_flight(degrees, shape, rank, {stage.index: 1 for stage in stages})
        for rank, stages in enumerate(held)
    ]


def test_a_rank_keeps_the_activations_of_the_microbatches_under_way() -> None:
    one = Schedule["1F1B"]
    assert kept_microbatches(one, 1, 8) == [4, 3, 2, 1]
    assert kept_microbatches(one, 1, 2) == [2, 2, 2, 1]
    assert kept_microbatches(Schedule.GPipe, 1, 8) == [8, 8, 8, 8]
    # (stages - 1) x pp + 2 x (ranks behind) + 1 under way, of those that come before the last stage.
    assert kept_microbatches(Schedule.Interleaved1F1B, 2, 8)[:3] == [11, 9, 7]
    assert kept_microbatches(Schedule.ZBVZeroBubble, 2, 8)[1:] == [8, 8, 8]


def test_a_stage_receives_every_microbatch_in_buffers_of_its_own() -> None:
    """An input but on the first rank, a gradient but on the last, for one more microbatch."""
    config, degrees = preset("16b"), ParallelDims(pp=4)
    more, fewer = (
        [memory.activations for memory in pipeline_memory(config, degrees, replace(BF16, microbatches=count))]
        for count in (17, 16)
    )
    row = 4096 * 2 * config.dim
    assert [(a - b) / row for a, b in zip(more, fewer, strict=True)] == [1, 2, 2, 1]


def test_with_one_microbatch_no_gradient_is_there_at_the_head() -> None:
    config, degrees = preset("16b"), ParallelDims(dp_shard=8)
    one, two = (rank_memory(config, degrees, replace(BF16, microbatches=count)) for count in (1, 2))
    assert (one.late_gradients, two.late_gradients) == (one.gradients, 0)
    assert two.total - one.total == one.gradients


def test_full_recomputation_keeps_block_inputs_and_the_block_at_work() -> None:
    def activations(layers: int, recompute: RecomputeMode) -> int:
        config = replace(preset("16b"), mtp_depths=1, num_layers=layers)
        return rank_memory(config, ParallelDims(), replace(BF16, recompute=recompute)).activations

    full, none = RecomputeMode.full, RecomputeMode.none
    assert activations(27, full) - activations(26, full) == 4096 * 2 * 2048
    block = Activations(preset("16b"), 2).block(dense=False).on_rank(4096, 1)
    assert activations(27, none) - activations(26, none) == block
    assert block / 2 < activations(27, full) - 28 * 4096 * 2 * 2048 < 2 * block


def test_selective_recomputation_lies_between_none_and_full() -> None:
    config = preset("16b")

    def activations(recompute: RecomputeMode, *keep: SavedOp) -> int:
        shape = replace(BF16, recompute=recompute, keep=keep)
        return rank_memory(config, ParallelDims(dp_shard=8, ep=8), shape).activations

    full, none = activations(RecomputeMode.full, *SavedOp), activations(RecomputeMode.none)
    assert activations(RecomputeMode.selective) == full
    attention = activations(RecomputeMode.selective, SavedOp.attention)
    # Of the layers before the last one, which is at work.
    assert attention - full == 26 * 4096 * 16 * (2 * 128 + 4)
    assert full < attention < activations(RecomputeMode.selective, *SavedOp) < none


def test_activations_shrink_with_the_ranks_of_a_row_and_grow_with_the_microbatch() -> None:
    config = preset("16b")
    one = rank_memory(config, ParallelDims(), BF16).activations
    three = rank_memory(config, ParallelDims(), replace(BF16, microbatch_size=3)).activations
    assert 2.9 * one < three < 3 * one  # a chunk of logits has its size
    assert one / 2 < rank_memory(config, ParallelDims(cp=2), BF16).activations < 0.7 * one
    assert one / 2 < rank_memory(config, ParallelDims(tp=2), BF16).activations < 0.6 * one
    replicated, sharded = (
        rank_memory(config, ParallelDims(**{axis: 2}), BF16).activations
        for axis in ("dp_replicate", "dp_shard")
    )
    assert replicated == sharded


def test_gathered_weights_count_two_blocks_or_all_and_one_groups_gradients() -> None:
    config, degrees = preset("16b"), ParallelDims(dp_shard=8)

    def sizes(of: list[Weight]) -> tuple[int, int]:
        in_fp32 = sum(w.numel for w in of if w.component in (Component.norms, Component.router))
        return sum(w.numel for w in of), 2 * in_fp32

    root, moe, dense = (
        2 * numbers + extra
        for numbers, extra in map(
            sizes,
            (
                [*parameters.embedding(config), *parameters.output(config)],
                parameters.block(config, dense=False),
                parameters.block(config, dense=True),
            ),
        )
    )
    # The experts' as they come and as they are summed, without their weights, which are freed before. The
    # head's gradient waits in bf16 for the end.
    block = parameters.block(config, dense=False)
    experts = sum(weight.numel for weight in block if weight.component is Component.experts)
    gradients = (2 + 4 - 2) * experts + 2 * count(config).head
    assert rank_memory(config, degrees, BF16).weight_copies == root + 2 * moe + gradients
    kept = replace(BF16, reshard_after_forward=False)
    assert rank_memory(config, degrees, kept).weight_copies == root + 26 * moe + dense + gradients


def test_a_pipeline_keeps_gathered_weights_and_whole_gradients_until_its_last_microbatch() -> None:
    config, degrees = preset("16b"), ParallelDims(pp=27, dp_shard=8, tp=2, ep=4)
    for reshard in (True, False):
        shape = replace(BF16, microbatches=27, reshard_after_forward=reshard)
        copies = pipeline_memory(config, degrees, shape)[5].weight_copies
        block = parameters.block(config, dense=False)
        local = [w.numel // {Component.experts: 4}.get(w.component, 2 if _split(w) else 1) for w in block]
        fp32 = sum(n for w, n in zip(block, local, strict=True) if w.component.name in ("norms", "router"))
        experts = sum(n for w, n in zip(block, local, strict=True) if w.component is Component.experts)
        # In bf16 and as fp32 sums, and at most a layer's gradients as they come. At the fullest moment, the
        # end of a forward pass, none of the layer has come.
        assert (2 + 4) * sum(local) + 2 * fp32 <= copies <= (2 + 4) * sum(local) + 2 * fp32 + 2 * experts


def test_weights_gathered_in_fp8_are_kept_as_codes_and_scales() -> None:
    config, degrees = preset("16b"), ParallelDims(dp_shard=8)
    shape = replace(BF16, reshard_after_forward=False)
    plain, gathered = (
        rank_memory(config, degrees, replace(shape, fp8=fp8)).weight_copies
        for fp8 in (FP8Shape(), FP8Shape(gather=True))
    )
    # A shard has whole blocks of q_proj, kv_b_proj, o_proj and every down_proj, but not of kv_a_proj's 576
    # rows, the shared experts' 2,816 or the dense layer's 10,944; routed experts are sharded whole.
    dim, experts, hidden = 2048, 64, 1408
    attention = [(16 * 192, dim), (16 * 256, 512), (dim, 16 * 128)]
    moe = [*attention, (dim, 2 * hidden), *[(2 * hidden, dim), (dim, hidden)] * experts]
    every = [*moe * 26, *attention, (dim, 10944)]
    numbers = sum(rows * columns for rows, columns in every)
    blocks = sum(-(-rows // 128) * -(-columns // 128) for rows, columns in every)
    # At the fullest moment a layer's experts are reduced, and their gathered weights are gone.
    freed = 3 * experts * dim * hidden
    assert plain - gathered == 2 * numbers - (numbers + 4 * blocks) - freed
    assert numbers > 0.9 * parameters.total(config)


def test_replicas_of_one_shard_copy_as_fsdp_does() -> None:
    config = preset("16b")
    replicas = rank_memory(config, ParallelDims(dp_replicate=8), BF16)
    assert replicas.weight_copies == rank_memory(config, ParallelDims(dp_shard=8), BF16).weight_copies
    assert replicas.parameters == 4 * parameters.total(config)


def test_offloaded_state_is_not_on_the_device() -> None:
    config, degrees = preset("16b"), ParallelDims(dp_shard=8)
    kept, offloaded = (
        rank_memory(config, degrees, replace(BF16, cpu_offload=there)) for there in (False, True)
    )
    assert (offloaded.parameters, offloaded.gradients, offloaded.optimizer) == (0, 0, 0)
    state = kept.total - offloaded.total
    assert state == 4 * kept.parameters
    # PyTorch rounds each pinned parameter and gradient up to a power of two, and not the optimizer's state.
    assert state < offloaded.offloaded == offloaded.pinned + kept.optimizer < 1.5 * state
    assert kept.offloaded == kept.pinned == 0


def test_a_gpus_save_copies_are_pinned_host_memory_of_exactly_their_size() -> None:
    config, degrees = preset("16b"), ParallelDims(dp_shard=8)
    shape = replace(BF16, pinned_copies=True)
    memory = rank_memory(config, degrees, shape)
    assert memory.pinned == memory.parameters + memory.optimizer
    assert memory.total == rank_memory(config, degrees, BF16).total
    offloaded = rank_memory(config, degrees, replace(shape, cpu_offload=True))
    assert offloaded.pinned == rank_memory(config, degrees, replace(BF16, cpu_offload=True)).pinned


def test_a_pinned_parameter_takes_the_next_power_of_two() -> None:
    """By hand, for a model whose weights are one rank's: 5 x 3 elements of 4 bytes take 64."""
    weight = Weight(Component.head, (5, 3))
    assert _pinned_state([weight], ParallelDims(), StateBytes()) == 2 * 64


def test_one_process_in_bf16_keeps_the_casts_of_its_matrices() -> None:
    config = preset("16b")
    counts = count(config)
    cast = counts.total - counts.embedding - counts.norms - counts.router
    # The peak is at the head, with the fp32 sum of its gradient and a chunk's addend in bf16.
    assert rank_memory(config, ParallelDims(), BF16).weight_copies == 2 * cast + 6 * counts.head
    recomputing = replace(BF16, recompute=RecomputeMode.full)
    assert rank_memory(config, ParallelDims(), recomputing).weight_copies < 2 * cast / 10


def test_one_process_in_fp8_casts_the_head_alone() -> None:
    config = preset("16b")
    shape = replace(BF16, fp8=FP8Shape())
    assert rank_memory(config, ParallelDims(), shape).weight_copies == (2 + 6) * count(config).head


def test_json_counts_the_copies_as_activations() -> None:
    memory = rank_memory(preset("16b"), ParallelDims(dp_shard=8), BF16)
    told = memory.to_json()
    assert list(told) == ["parameters", "gradients", "optimizer", "activations", "total"]
    assert told.pop("total") == sum(told.values()) == memory.total
    assert told["activations"] == memory.activations + memory.weight_copies
