"""Rules for a training step, for weights that are read, and for what a layout may not change."""

from benchmarks.rules.mutation import Mutation

MODEL = "tests/model"
TRAINING = "tests/training"
SHARDED = "tests/parallel/test_parity.py"
DEEPEP = "tests/parallel/test_deepep.py"
RUNS = "tests/training/test_accident_runs.py"
GUARD = "tests/training/test_step_guard.py"
SKIPPED = "tests/parallel/test_accidents.py"

RULES = [
    Mutation(
        "loss divided once by the global count",
        "dsv3.training.step:TrainStep",
        "torch.stack([$count($batch) for $batch in $batches]).sum()",
        "torch.stack([$count($batch) for $batch in $batches]).max() * len($batches)",
        TRAINING,
    ),
    Mutation(
        "gradients summed over ranks, not averaged",
        "dsv3.parallel.fsdp",
        "$module.set_gradient_divide_factor(1.0)",
        "$module.set_gradient_divide_factor(2.0)",
        SHARDED,
    ),
    Mutation(
        "a step that is not finite is skipped",
        "dsv3.training.step_guard:StepGuard.judge",
        "torch.where($finite, $spike, NONFINITE)",
        "torch.where($finite, $spike, GOOD)",
        f"{GUARD} {SKIPPED}",
    ),
    Mutation(
        "so is one of whose losses one is not finite",
        "dsv3.training.step:TrainStep.__call__",
        "$summed[:3].isfinite().all()",
        "$summed[:1].isfinite().all()",
        SKIPPED,
    ),
    Mutation(
        "a spike is measured against the median, and of good norms alone",
        "dsv3.training.step_guard:StepGuard.judge",
        "($places == $count % $window) & $good",
        "$places == $count % $window",
        GUARD,
    ),
    Mutation(
        "a spike needs a full window",
        "dsv3.training.step_guard:StepGuard.judge",
        "torch.where($count >= $window, $spike, $limit)",
        "torch.where($count >= 1, $spike, $limit)",
        GUARD,
    ),
    Mutation(
        "biases stay at a skipped step",
        "dsv3.training.expert_bias:update_expert_bias",
        "torch.where($skip, $bias, $bias + $change)",
        "$bias + $change",
        SKIPPED,
    ),
    Mutation(
        "the steps of bf16 moments do not count a skipped one",
        "dsv3.training.optimizer:BF16MomentAdamW.step",
        "foreach_subtract_(...)",
        "",
        SKIPPED,
    ),
    Mutation(
        "Muon puts back what a skipped step has changed",
        "dsv3.training.muon:Muon._put_back",
        "torch.where($skip, $before, $tensor, ...)",
        "torch.where($skip, $tensor, $tensor, ...)",
        SKIPPED,
    ),
    Mutation(
        "a checkpoint saved under an alarm is not the best",
        "dsv3.checkpoint.retention:_loss",
        "$progress.statistics.in_doubt",
        "False",
        "tests/checkpoint/test_retention.py",
    ),
    Mutation(
        "the last good checkpoint stays",
        "dsv3.checkpoint.retention:kept",
        "$stay |= {$good}",
        "",
        "tests/checkpoint/test_retention.py",
    ),
    Mutation(
        "a run that has gone back leaves no later checkpoint to resume from",
        "dsv3.training.rewind:Rewinder._forget",
        "remove($step)",
        "",
        "tests/training/test_rewind.py",
    ),
    Mutation(
        "the statistics behind skipped steps are part of a checkpoint",
        "dsv3.checkpoint.directory:Progress.write",
        "self.statistics == RunStatistics()",
        "True",
        RUNS,
    ),
    Mutation(
        "a rise is measured against the lowest mean of the loss",
        "dsv3.training.accidents:AccidentWatch._watch_loss",
        "$mean < $lowest",
        "$mean > $lowest",
        "tests/training/test_accidents.py",
    ),
    Mutation(
        "skipped steps are counted in a window",
        "dsv3.training.accidents:AccidentWatch._note_skipped",
        "$step > $row.step - $within",
        "$step > 0",
        "tests/training/test_accidents.py",
    ),
    Mutation(
        "a live export names what is not finite",
        "dsv3.convert.shard_exchange:ShardExchange._own_part",
        "require_finite_export(...)",
        "",
        "tests/convert/test_nonfinite.py",
    ),
    Mutation(
        "one gradient norm over all shards",
        "dsv3.training.optimizer:gradient_norm",
        "$ranks.sum($squares).sqrt()",
        "$squares.sqrt()",
        SHARDED,
    ),
    Mutation(
        "block-fp8 scales are used",
        "dsv3.hf.storage_reader:HFSource",
        "$dequantize($read, $grid, $block, $origin, $dtype, $out)",
        "$out.copy_($read)",
        "tests/hf/test_storage_reader.py",
    ),
    Mutation(
        "and their blocks counted by global rows",
        "dsv3.hf.storage_reader:HFSource",
        "$dequantize($read, $grid, $block, $origin, $dtype, $out)",
        "$dequantize($read, $grid, $block, (0, 0), $dtype, $out)",
        "tests/hf/test_storage_reader.py",
    ),
    Mutation(
        "every number of the stored config is compared",
        "dsv3.config.model_difference:require_stored_numbers",
        "if refused: ...",
        "if False: ...",
        "tests/config/test_model_difference.py",
    ),
    Mutation(
        "weights that are read are finite",
        "dsv3.hf.nonfinite:require_finite",
        "if not is_finite($values): ...",
        "if False: ...",
        "tests/convert/test_nonfinite.py",
    ),
    Mutation(
        "a scale of 0 is that of zeros alone",
        "dsv3.hf.storage_reader:HFSource.read_scales",
        "($grid[$row] == 0) & $zero",
        "$grid[$row] == 0",
        "tests/hf/test_storage_reader_lawful.py",
    ),
    Mutation(
        "an MTP layer's copies are equal to their originals",
        "dsv3.hf.storage_reader:HFSource.require_equal_duplicates",
        "if not torch.equal($copy, $values): ...",
        "if False: ...",
        "tests/hf/test_storage_reader_lawful.py",
    ),
    Mutation(
        "gate before up in a stack of experts",
        "dsv3.hf.stacked_experts:_matrices",
        "($expert * len($halves) + $number) * $size",
        "($expert * len($halves) + 1 - $number) * $size",
        "tests/hf/test_storage_reader_lawful.py",
    ),
    Mutation(
        "documents do not see each other",
        "dsv3.training.step:LocalForwardBackward.train",
        "self.$model($tokens, self.$documents($batch), ...)",
        "self.$model($tokens, None, ...)",
        TRAINING,
    ),
    Mutation(
        "logits in fp32",
        "dsv3.model.head:Head.forward",
        "F.linear($x, $weight).float()",
        "F.linear($x, $weight)",
        MODEL,
    ),
    Mutation(
        "positions that do not count get no gradient",
        "dsv3.model.head:cross_entropy_",
        "$scale = $counts * $factor",
        "$scale = $factor",
        MODEL,
    ),
    Mutation(
        "the head's gradients are scaled by the one that arrives",
        "dsv3.model.head:_KnownGradient.backward",
        "$gradient.mul_($arriving[0])",
        "$gradient",
        MODEL,
    ),
    Mutation(
        "latent cache holds normed latents",
        "dsv3.model.attention:LatentAttention.compress",
        "return $q, self.$norm($latent), $k",
        "return $q, $latent, $k",
        MODEL,
    ),
    Mutation(
        "gathered latents: every tensor rank's gradient counts",
        "dsv3.parallel.collectives:_AllGather.backward",
        "$reduce($gradient, $ctx.$dim, $ctx.$group)",
        "$gradient.chunk($ctx.$group.size(), $ctx.$dim)[$ctx.$group.rank()]",
        SHARDED,
    ),
    Mutation(
        "balance loss counts whole sequences where they are split",
        "dsv3.parallel.context_parallel:RouterReduction.sum",
        "return $reduce($counts, ...)",
        "return $counts * self.shards",
        SHARDED,
    ),
    Mutation(
        "context parallel: keys in the row's order",
        "dsv3.parallel.context_parallel:undo_zigzag",
        "$chunks[1::2][::-1]",
        "$chunks[1::2]",
        SHARDED,
    ),
    Mutation(
        "pipeline: the embedding's two gradients are added",
        "dsv3.parallel.pipeline_parallel:PipelineForwardBackward.train",
        "self._sum_embedding_gradients()",
        "",
        SHARDED,
    ),
    Mutation(
        "pipeline: balance loss reaches every stage",
        "dsv3.parallel.pipeline_parallel:_AttachLoss.backward",
        "torch.ones_like($term)",
        "torch.zeros_like($term)",
        SHARDED,
    ),
    Mutation(
        "vocabulary parallel: the loss over all ranks' logits",
        "dsv3.parallel.tensor_parallel:VocabularyShard.reduce",
        "($total * ($largest - $whole).exp()).sum(-1, keepdim=True)",
        "$total[:, :1]",
        SHARDED,
    ),
    Mutation(
        "expert parallel: a row takes its own experts' weights along",
        "dsv3.parallel.token_dispatch:run_local_experts",
        "$weights[$permutation.$source, $permutation.$place].to($dtype)",
        "$weights[$permutation.$source].amax(-1).to($dtype)",
        SHARDED,
    ),
    Mutation(
        "DeepEP: rows are read once they have arrived",
        "dsv3.parallel.deepep:DeepEPTokenDispatcher.combine",
        "$received.$event.current_stream_wait()",
        "",
        DEEPEP,
    ),
    Mutation(
        "DeepEP: the gradient of the weights comes back",
        "dsv3.parallel.deepep:_Dispatch.backward",
        "return $x, $summed, None, None",
        "return $x, None, None, None",
        DEEPEP,
    ),
    Mutation(
        "DeepEP: gradients of results go in FP8 where rows do",
        "dsv3.parallel.deepep:_Combine.backward",
        """
$received = $buffer.dispatch($format.$encode($gradient), ...)[0]
return $format.$decode($received), None, None
""",
        """
$received = $buffer.dispatch($gradient.contiguous(), ...)[0]
return $received, None, None
""",
        DEEPEP,
    ),
]
