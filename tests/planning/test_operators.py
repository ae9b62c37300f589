"""The operators of a layer: the model's FLOPs, shared out by the axes, and bytes that depend on fusion."""

from dataclasses import replace

import pytest

from dsv3.config.parallel import RecomputeMode, SavedOp
from dsv3.model import cpu_attention
from dsv3.planning.layout import ParallelDims
from dsv3.planning.operators import QUERIES, Kind, Operators, Passes, Work, recomputed
from dsv3.planning.parameters import training_flops_per_token
from dsv3.planning.step_shape import FP8Shape, StateBytes, StepShape
from tests.planning.presets import preset

LARGE = preset("671b")
BF16 = StepShape(1, 4096, state=StateBytes(compute=2), ranks_per_node=8)
MATMULS = {Kind.matmul, Kind.grouped, Kind.exact, Kind.matmul_fp8, Kind.grouped_fp8}


def flops(passes: Passes) -> float:
    """Return a layer's training FLOPs, the backward pass of attention as twice its forward pass."""
    every = [*passes.forward, *passes.inputs, *passes.weights]
    attention = sum(work.flops for work in passes.forward if work.kind is Kind.attention)
    return sum(work.flops for work in every if work.kind in MATMULS) + 3 * attention


def moved(works: list[Work]) -> float:
    return sum(work.bytes for work in works)


def test_the_flops_of_all_operators_are_those_of_the_model() -> None:
    """4,096 tokens give each of 256 experts 128 rows, which fill their tiles."""
    parts = Operators(LARGE, ParallelDims(), BF16)
    dense, moe = parts.layer(True), parts.layer(False)
    found = 3 * flops(dense) + 59 * flops(moe) + 2 * flops(parts.head()) + flops(parts.mtp_join())
    assert found == pytest.approx(4096 * training_flops_per_token(LARGE, 4096), rel=1e-9)


@pytest.mark.parametrize(
    "degrees", [ParallelDims(tp=4), ParallelDims(dp_shard=8, ep=8), ParallelDims(tp=8, ep=4)]
)
@pytest.mark.parametrize("dense", [True, False])
def test_tp_shares_a_layer_out_and_ep_leaves_its_work_as_it_is(degrees: ParallelDims, dense: bool) -> None:
    full = replace(BF16, microbatch_size=8)  # tiles of experts stay full on an eighth of the tokens
    whole, part = (Operators(LARGE, d, full).layer(dense) for d in (ParallelDims(), degrees))
    assert degrees.tp * flops(part) == pytest.approx(flops(whole), rel=1e-9)


def test_cp_shares_out_all_but_the_expansion_of_keys_and_values() -> None:
    whole, part = (Operators(LARGE, ParallelDims(cp=cp), BF16).layer(True) for cp in (1, 4))
    a = LARGE.attention
    expansion = 6 * 4096 * a.kv_lora_rank * a.heads * (a.qk_nope_head_dim + a.v_head_dim)
    assert 4 * flops(part) == pytest.approx(flops(whole) + 3 * expansion, rel=1e-9)


def test_more_ranks_per_expert_fill_tiles() -> None:
    """A quarter of the tokens gives each expert 32 rows, which are computed as 128."""
    short = replace(BF16, sequence_length=1024)

    def grouped(degrees: ParallelDims) -> float:
        layer = Operators(LARGE, degrees, short).layer(False)
        return sum(work.flops for work in layer.forward if work.kind is Kind.grouped)

    assert grouped(ParallelDims()) == 4 * grouped(ParallelDims(dp_shard=4, ep=4))


def test_fp8_takes_the_linear_layers_and_experts_alone() -> None:
    shape = replace(BF16, fp8=FP8Shape())
    parts = Operators(LARGE, ParallelDims(), shape)
    assert {work.kind for work in parts.layer(False).forward} >= {
        Kind.matmul_fp8,
        Kind.grouped_fp8,
        Kind.exact,
    }
    assert {work.kind for work in parts.layer(False).forward}.isdisjoint({Kind.matmul, Kind.grouped})
    assert {work.kind for work in parts.head().forward} == {Kind.matmul, Kind.memory}
    # Weights that are gathered as codes are not quantized again; the emulation adds every block's sums in
    # fp32.
    quantized, gathered, emulated = (
        moved(Operators(LARGE, ParallelDims(), replace(BF16, fp8=fp8)).layer(False).forward)
        for fp8 in (FP8Shape(), FP8Shape(gather=True), FP8Shape(emulated=True))
    )
    assert gathered < quantized < emulated


def test_fused_operators_move_fewer_bytes_by_fewer_kernels() -> None:
    eager, compiled = (
        Operators(LARGE, ParallelDims(), replace(BF16, compiled=c)).layer(False) for c in (False, True)
    )
    for name in ("forward", "inputs", "weights"):
        slow, fast = getattr(eager, name), getattr(compiled, name)
        assert moved(fast) < moved(slow)
        assert sum(work.kernels for work in fast) < sum(work.kernels for work in slow)
    assert flops(eager) == flops(compiled)


def test_the_backward_pass_of_attention_is_five_matmuls_for_two() -> None:
    """The scores again and their two gradients are as wide as queries, the other two as values."""
    layer, a = Operators(LARGE, ParallelDims(), BF16).layer(False), LARGE.attention
    (forward,) = (work.flops for work in layer.forward if work.kind is Kind.attention)
    (backward,) = (work.flops for work in layer.inputs if work.kind is Kind.attention_backward)
    widths = a.qk_head_dim + a.v_head_dim
    assert backward / forward == pytest.approx((3 * a.qk_head_dim + 2 * a.v_head_dim) / widths)


@pytest.mark.parametrize("kind", [Kind.attention, Kind.attention_backward])
def test_on_a_cpu_a_block_of_queries_meets_the_keys_of_its_last_one(kind: Kind) -> None:
    def work(length: int, on_gpu: bool) -> float:
        shape = replace(BF16, sequence_length=length, fused_kernels=on_gpu)
        layer = Operators(LARGE, ParallelDims(), shape).layer(True)
        return sum(work.flops for work in [*layer.forward, *layer.inputs] if work.kind is kind)

    blocks = range(QUERIES, 1024 + 1, QUERIES)  # the keys that each block sees
    share = sum(QUERIES * keys for keys in blocks) / (1024**2 / 2)
    assert work(1024, False) / work(1024, True) == pytest.approx(share)
    assert work(64, False) / work(64, True) == pytest.approx(2)
    assert QUERIES == cpu_attention.BLOCK


def test_on_a_cpu_experts_compute_their_rows_alone() -> None:
    short = replace(BF16, sequence_length=1024)
    layers = [Operators(LARGE, ParallelDims(), replace(short, fused_kernels=on)) for on in (True, False)]
    tiles, rows = (
        sum(work.flops for work in each.layer(False).forward if work.kind is Kind.grouped) for each in layers
    )
    assert tiles == 4 * rows


def test_recomputation_repeats_all_but_what_is_kept() -> None:
    layer = Operators(LARGE, ParallelDims(), BF16).layer(False)
    assert list(recomputed(layer, None)) == layer.forward
    kept = list(recomputed(layer, (SavedOp.attention, SavedOp.experts)))
    assert {work.kind for work in kept} == {Kind.matmul, Kind.exact, Kind.memory}
    assert {work.kind for work in recomputed(layer, tuple(SavedOp))} == {Kind.exact, Kind.memory}
    assert BF16.recompute is RecomputeMode.none
