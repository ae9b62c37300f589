from dataclasses import replace

import pytest

from dsv3.parallel.config import Recomputed
from dsv3.parallel.degrees import Degrees
from dsv3.planning import parameters, weights
from dsv3.planning.activations import Activations
from dsv3.planning.memory import (
    StateBytes,
    StepShape,
    local_shape,
    rank_memory,
    shard_count,
    stage_groups,
    stage_memory,
    stages,
    stored,
)
from dsv3.planning.weights import Component, Weight
from tests.planning.presets import NAMES, preset

STEP = StepShape(microbatch_size=1, sequence_length=4096)
BF16 = replace(STEP, state=StateBytes(compute=2))


@pytest.mark.parametrize("name", NAMES)
def test_one_process_holds_sixteen_bytes_a_parameter_and_no_copies(name: str) -> None:
    memory = rank_memory(preset(name), Degrees(), STEP)
    count = parameters.total(preset(name))
    assert (memory.parameters, memory.gradients, memory.optimizer) == (4 * count, 4 * count, 8 * count)
    assert memory.weight_copies == 0
    assert memory.total == 16 * count + memory.activations


@pytest.mark.parametrize(
    "degrees",
    [
        Degrees(dp_shard=2048, ep=64),
        Degrees(dp_shard=256, tp=8, ep=256),
        Degrees(dp_shard=100, cp=3),
        Degrees(dp_shard=6, ep=4, tp=4),
    ],
    ids=str,
)
def test_the_shards_of_every_weight_add_up_to_the_whole(degrees: Degrees) -> None:
    config = preset("671b")
    for weight in {*weights.main_model(config), *weights.mtp_modules(config)[0]}:
        shards = shard_count(weight, degrees)
        held = sum(stored(weight, degrees, shard) for shard in range(shards))
        parts = {Component.experts: degrees.ep}.get(weight.component, degrees.tp if _split(weight) else 1)
        assert held * parts == weight.numel
        assert stored(weight, degrees) == max(stored(weight, degrees, shard) for shard in range(shards))


def _split(weight: Weight) -> bool:
    return weight.tensor_dim is not None


def test_671b_over_2048_ranks_is_the_whole_but_for_rounding_up() -> None:
    config, degrees = preset("671b"), Degrees(dp_shard=2048, ep=64)
    whole = 16 * parameters.total(config)
    memory = rank_memory(config, degrees, BF16)
    held = 2048 * (memory.parameters + memory.gradients + memory.optimizer)
    assert whole <= held < 1.005 * whole


def test_an_even_layout_loses_nothing() -> None:
    config, degrees = preset("671b"), Degrees(dp_replicate=32, dp_shard=64, ep=64)
    memory = rank_memory(config, degrees, BF16)
    assert 64 * memory.parameters == 4 * parameters.total(config)


def test_uneven_shards_round_up_by_whole_rows() -> None:
    weight = Weight(Component.attention, (10, 7))
    assert [stored(weight, Degrees(dp_shard=4), shard) for shard in range(4)] == [21, 21, 21, 7]
    assert [stored(weight, Degrees(dp_shard=16), shard) for shard in (0, 9, 10)] == [7, 7, 0]


def test_experts_are_cut_by_expert_and_beyond_that_by_row() -> None:
    stack = Weight(Component.experts, (8, 6, 5))
    assert stored(stack, Degrees(dp_shard=4, tp=2)) == 6 * 5
    assert stored(stack, Degrees(dp_shard=16, ep=8)) == 3 * 5
    assert stored(stack, Degrees(dp_replicate=2, dp_shard=4, ep=4)) == 2 * 6 * 5


def test_tensor_parallelism_splits_the_matrices_with_heads_and_leaves_the_norms() -> None:
    assert local_shape(Weight(Component.attention, (12, 5), 0), Degrees(tp=4)) == (3, 5)
    assert local_shape(Weight(Component.attention, (5, 12), 1), Degrees(tp=4)) == (5, 3)
    assert local_shape(Weight(Component.norms, (12,)), Degrees(tp=4)) == (12,)


def test_tp_splits_all_of_attention_but_the_projections_to_latents() -> None:
    config, two = preset("671b"), Degrees(tp=2)
    attention = [w for w in weights.block(config, dense=True) if w.component is Component.attention]
    whole = 7168 * (1536 + 512 + 64)
    count = parameters.attention_per_layer(config)
    assert sum(stored(w, two) for w in attention) == whole + (count - whole) // 2


def test_stages_split_the_layers_evenly_with_embedding_first_and_head_and_mtp_last() -> None:
    config = preset("671b")
    split = stages(config, 16)
    assert [len(stage.dense) for stage in split] == [4] * 13 + [3] * 3
    assert split[0].dense == [True, True, True, False]
    assert [stage.mtp_depths for stage in split] == [0] * 15 + [1]
    held = [{w.component for group in stage_groups(config, stage) for w in group} for stage in split]
    assert [n for n, kinds in enumerate(held) if Component.embedding in kinds] == [0, 15]
    assert [n for n, kinds in enumerate(held) if Component.head in kinds] == [15]
    numbers = sum(w.numel for stage in split for group in stage_groups(config, stage) for w in group)
    # The last stage's copy of the embedding, which its MTP depth reads.
    assert numbers == parameters.total(config) + parameters.count(config).embedding


def test_the_worst_stage_is_reported() -> None:
    config, degrees = preset("671b"), Degrees(pp=16, dp_shard=128, ep=64)
    shape = replace(BF16, microbatches=15)
    every = [stage_memory(config, degrees, shape, stage).total for stage in stages(config, 16)]
    assert rank_memory(config, degrees, shape).total == max(every) > min(every)


def test_a_stage_keeps_one_activation_a_microbatch_in_flight() -> None:
    config, degrees = preset("236b"), Degrees(pp=4)
    kept = [
        [stage_memory(config, degrees, replace(BF16, microbatches=n), stage).activations for n in (1, 2, 8)]
        for stage in stages(config, 4)
    ]
    first, second, _, last = kept
    assert (first[1], first[2]) == (2 * first[0], 4 * first[0])
    assert (second[1], second[2]) == (2 * second[0], 3 * second[0])
    assert last[0] == last[1] == last[2]


def test_full_recomputation_keeps_block_inputs_and_the_block_at_work() -> None:
    config = replace(preset("16b"), mtp_depths=1)
    shape = replace(BF16, recompute=Recomputed.full)
    saved = Activations(config, 2)
    largest = max(saved.block(dense).on_rank(4096, 1) for dense in (True, False))
    rest = sum(part.on_rank(4096, 1) for part in (saved.logits(), saved.logits(), saved.mtp_join()))
    inputs = 28 * 4096 * 2 * 2048
    assert rank_memory(config, Degrees(), shape).activations == inputs + largest + rest
    assert rank_memory(config, Degrees(), BF16).activations > 3 * (inputs + largest)


def test_activations_shrink_with_the_ranks_of_a_row_and_grow_with_the_microbatch() -> None:
    config = preset("16b")
    one = rank_memory(config, Degrees(), BF16).activations
    assert rank_memory(config, Degrees(), replace(BF16, microbatch_size=3)).activations == 3 * one
    assert 2 * rank_memory(config, Degrees(cp=2), BF16).activations == one
    assert one / 2 < rank_memory(config, Degrees(tp=2), BF16).activations < 0.6 * one
    assert rank_memory(config, Degrees(dp_replicate=2), BF16).activations == one


def test_gathered_weights_count_two_blocks_or_all_and_one_gradient() -> None:
    config, degrees = preset("16b"), Degrees(dp_shard=8)
    root = 2 * 102400 * 2048 + 2048
    moe = sum(w.numel for w in weights.block(config, dense=False))
    dense = sum(w.numel for w in weights.block(config, dense=True))
    assert rank_memory(config, degrees, BF16).weight_copies == 2 * (root + 2 * moe + moe)
    kept = replace(BF16, reshard_after_forward=False)
    assert rank_memory(config, degrees, kept).weight_copies == 2 * (root + 26 * moe + dense + moe)
    assert rank_memory(config, degrees, STEP).weight_copies == 4 * (root + 3 * moe)


def test_replicas_of_one_shard_copy_as_fsdp_does() -> None:
    config = preset("16b")
    replicas = rank_memory(config, Degrees(dp_replicate=8), BF16)
    assert replicas.weight_copies == rank_memory(config, Degrees(dp_shard=8), BF16).weight_copies
    assert replicas.parameters == 4 * parameters.total(config)


def test_one_process_in_bf16_keeps_the_casts_of_its_matrices() -> None:
    config = preset("16b")
    counts = parameters.count(config)
    cast = counts.total - counts.embedding - counts.norms - counts.router
    assert rank_memory(config, Degrees(), BF16).weight_copies == 2 * cast
    recomputing = replace(BF16, recompute=Recomputed.full)
    assert rank_memory(config, Degrees(), recomputing).weight_copies < 2 * cast / 10


def test_json_counts_the_copies_as_activations() -> None:
    memory = rank_memory(preset("16b"), Degrees(dp_shard=8), BF16)
    told = memory.to_json()
    assert list(told) == ["parameters", "gradients", "optimizer", "activations", "total"]
    assert told.pop("total") == sum(told.values()) == memory.total
    assert told["activations"] == memory.activations + memory.weight_copies
