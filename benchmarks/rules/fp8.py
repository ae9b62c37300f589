"""Rules for FP8: tiles, scales, and what is gathered or sent as codes."""

from benchmarks.rules.mutation import Mutation

PRECISION = "tests/fp8 tests/planning/test_checks_fp8.py"
BLOCK_WEIGHT = "tests/fp8/test_operands_block_weight.py"

RULES = [
    Mutation(
        "FP8: a tile never crosses an expert's rows",
        "dsv3.fp8.ops",
        """
$blocks = $make($weight, $scales, $expert, $recipe, $rows.dtype)
$out[$own] = $engine.$matmul($operand, $blocks, $rows.dtype)
""",
        """
$blocks = $recipe.quantize_weight($weight.flatten(0, -2).to($rows.dtype))
first = $expert * $out.shape[1]
$out[$own] = $engine.$matmul($operand, $blocks, $rows.dtype)[:, first : first + $out.shape[1]]
""",
        PRECISION,
    ),
    Mutation(
        "FP8: rows of another expert are in no tile along the tokens",
        "dsv3.fp8.ops",
        "$make.$along($dy[$own]), $make.$along($rows[$own])",
        "($make.$along($dy[$own]), $make.$along($rows)._replace(codes=$make.$along($rows).codes[:, $own]))",
        PRECISION,
    ),
    Mutation(
        "FP8: scales after the sum of a block",
        "dsv3.fp8.matmul",
        """
torch.mm($left[:, $depth], $right[:, $depth].t(), out=$sums)
$out.addcmul_($sums.mul_($by[:, $n, None]), $and_by[:, $n].expand_as($sums))
""",
        """
torch.mm($left[:, $depth] * $by[:, $n, None], ($right[:, $depth] * $and_by[:, $n, None]).t(), out=$sums)
$out.add_($sums)
""",
        PRECISION,
    ),
    Mutation(
        "FP8: the weight's gradient has tiles along the tokens",
        "dsv3.fp8.operands:FP8Recipe.quantize_along_tokens",
        "self.$quantize($x, ($tile, 1))",
        "self.$quantize($x, (1, $tile))._replace(block=($tile, 1))",
        PRECISION,
    ),
    Mutation(
        "FP8: the gradient of the rows takes the weight's grid turned",
        "dsv3.fp8.operands:QuantizedOperand.transpose",
        "$make($codes.t(), $scales.t(), $block)",
        "$make($codes.t(), $scales.reshape($scales.shape[::-1]), $block)",
        PRECISION,
    ),
    Mutation(
        "FP8: what is not finite is counted",
        "dsv3.fp8.quantize:count_nonfinite_blocks",
        "$by_block($nan, $block).amax((1, 3)).sum()",
        "$by_block($nan, $block).amax((1, 3)).sum() * 0",
        PRECISION,
    ),
    Mutation(
        "FP8: a split backward pass computes each gradient once",
        "dsv3.distributed.torch_private",
        "torch._C._will_engine_execute_node($source)",
        "True",
        PRECISION,
    ),
    Mutation(
        "FP8: and counts what is not finite all the same",
        "dsv3.fp8.ops",
        "$leaf.grad = $count if $leaf.grad is None else $leaf.grad + $count",
        "",
        PRECISION,
    ),
    Mutation(
        "FP8: the plan knows which weights are gathered so",
        "dsv3.planning.sharding:is_gathered_in_fp8",
        "$used and $shards > 1 and not $odd and $whole % $block == 0",
        "$used and $shards > 1 and not $odd",
        "tests/parallel/test_scale.py",
    ),
    Mutation(
        "FP8: FSDP's strided shards count where whole blocks are asked for",
        "dsv3.fp8.all_gather",
        '[getattr($p, "dim", None) for $p in $placements]',
        '[getattr($p, "dim", None) if $p.is_shard() else None for $p in $placements]',
        "tests/parallel/test_fp8.py",
    ),
    Mutation(
        "FP8: a rank alone in its group gathers nothing",
        "dsv3.fp8.all_gather:all_gather_in_fp8",
        "$shards == 1 or $odd",
        "$odd",
        "tests/parallel/test_fp8.py",
    ),
    Mutation(
        "FP8: products take the codes that were gathered",
        "dsv3.fp8.operands:QuantizedWeight.__torch_dispatch__",
        "$function($rows, $weight.codes, $weight.scales, *$rest, **$more)",
        "$function($rows, $weight.dequantize(), None, *$rest, **$more)",
        BLOCK_WEIGHT,
    ),
    Mutation(
        "FP8: each expert's codes meet its own scales",
        "dsv3.fp8.ops",
        "$make($one, $scales[$own], $block)",
        "$make($one, $scales[: $one.shape[0] // BLOCK], $block)",
        BLOCK_WEIGHT,
    ),
    Mutation(
        "FP8: rows that travel bring their scales",
        "dsv3.fp8.operands",
        "$scales.view(torch.float32)",
        "torch.ones_like($scales.view(torch.float32))",
        "tests/parallel/test_fp8.py",
    ),
    Mutation(
        "FP8: no hardware without block-wise scales",
        "dsv3.planning.checks",
        "if $fp8.engine is FP8Engine.scaled_mm and not is_hopper($on): ...",
        "if False: ...",
        PRECISION,
    ),
    Mutation(
        "FP8: and does not make its tile's scale",
        "dsv3.fp8.quantize",
        "$numbers.nan_to_num(nan=0.0).abs().amax((1, 3))",
        "$numbers.nan_to_num(nan=448.0).abs().amax((1, 3))",
        PRECISION,
    ),
    Mutation(
        "FP8: scaled_mm reads a weight's scales by columns padded to four",
        "dsv3.fp8.matmul",
        "F.pad($scales, (0, -$scales.shape[1] % $four), value=1.0).contiguous().t()",
        "$scales.contiguous().t()",
        PRECISION,
    ),
]
