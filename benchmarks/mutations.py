"""Break each numerics rule on purpose, in a copy of the project, and record which test notices.

A mutation replaces one piece of one function, which benchmarks/code_patterns.py finds by its shape: it
survives renamed locals and moved lines. It counts as caught when a test of the named folders fails. The
results go into benchmarks/results/mutations.json, a summary into docs/numerics.md. A rule that no test holds
makes the command exit with 1.

    python -m benchmarks.mutations
    python -m benchmarks.mutations --only yarn
    python -m benchmarks.mutations --new
"""

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.code_patterns import edit
from benchmarks.pages import fill

ROOT = Path(__file__).resolve().parent.parent
RESULT = Path(__file__).resolve().parent / "results" / "mutations.json"
NETWORK, RESTARTS = "tests/launch/test_network.py", "tests/launch/test_restarts.py"
MODEL, HF, TRAINING = "tests/model", "tests/hf", "tests/training"
SHARDED, DEEPEP = "tests/parallel/test_parity.py", "tests/parallel/test_deepep.py"
PADDED, DISPATCH = "tests/model/test_padding.py", "tests/parallel/test_token_dispatch.py"
RUNS = "tests/training/test_accident_runs.py"
GUARD, SKIPPED = "tests/training/test_step_guard.py", "tests/parallel/test_accidents.py"
PRECISION = "tests/fp8 tests/planning/test_checks_fp8.py"
REPLAY, REPLAYED = "tests/tasks/test_replay.py", "tests/launch/test_replayed_run.py"
REPLICAS, STRAGGLERS = "tests/parallel/test_replicas.py", "tests/training/test_stragglers.py"
VERDICT = "tests/tasks/test_replay_verdict.py"
DOCUMENTS = "tests/documents/test_document_files.py"
FILES = "tests/untrusted/test_untrusted_files.py"
NUMBERS = "tests/config/test_limits.py"
LOCK = "tests/distributed/test_directory_lock.py"
SIGNALS = "tests/distributed/test_signals.py"
PICKLE = "tests/checkpoint/test_metadata_pickle.py"
ARCHIVE = "tests/checkpoint/test_tensor_archive.py"
WATCH = "tests/training/test_accidents.py"
REWIND = "tests/training/test_rewind.py"
MANIFEST = "tests/checkpoint/test_manifest.py"
CACHE = "tests/data/test_cache_damage.py"
BLOCK_WEIGHT = "tests/fp8/test_operands_block_weight.py"


@dataclass
class Mutation:
    """One rule, and the edit that breaks it."""

    rule: str
    where: str
    """MODULE:FUNCTION, MODULE:CLASS or MODULE."""
    old: str
    """The pattern that has to fit in one place; see code_patterns.py."""
    new: str
    tests: str

    @property
    def file(self) -> Path:
        """The module's file, relative to the project."""
        return Path(self.where.partition(":")[0].replace(".", "/") + ".py")

    def apply(self, source: str) -> str:
        """Return the module's `source` with the rule broken."""
        return edit(source, self.where.partition(":")[2], self.old, self.new)


MUTATIONS = [
    Mutation(
        "a pipe or device is not read as a file",
        "dsv3.untrusted_files:_require_regular",
        "stat.S_ISREG(status.st_mode)",
        "True",
        "tests/untrusted/test_untrusted_files.py",
    ),
    Mutation(
        "a file is refused beyond the bytes of its kind",
        "dsv3.untrusted_files:read_bytes",
        "max(size, len(content)) > limit",
        "False",
        "tests/untrusted/test_untrusted_files.py",
    ),
    Mutation(
        "an alias of YAML counts as often as it is used",
        "dsv3.untrusted_files:_BoundedLoader.compose_node",
        "self.anchored.get(event.anchor, self.limits.nodes + 1)",
        "1",
        "tests/untrusted/test_untrusted_files.py",
    ),
    Mutation(
        "JSON is nested only so deep",
        "dsv3.untrusted_files:parse_json",
        "_require_depth(value, limits.depth, path)",
        "None",
        "tests/untrusted/test_untrusted_files.py",
    ),
    Mutation(
        "a list of a config has so many values at most",
        "dsv3.config.limits:require_within",
        "len(numbers) > ITEMS",
        "False",
        "tests/config/test_limits.py",
    ),
    Mutation(
        "an archive of a tensor is not compressed",
        "dsv3.checkpoint.tensor_archive:_entry",
        "method != 0 or size != packed",
        "False",
        "tests/checkpoint/test_tensor_archive.py",
    ),
    Mutation(
        "a put of a pickle goes to the next place",
        "dsv3.checkpoint.metadata_pickle:_put",
        "place < len(memo)",
        "True",
        "tests/checkpoint/test_metadata_pickle.py",
    ),
    Mutation(
        "a preset that Hydra reads is bounded",
        "dsv3.config.preset_source:FileConfigSource.load_config",
        "require_bounded_yaml($path)",
        "None",
        "tests/untrusted/test_entrances.py",
    ),
    Mutation(
        "router in fp32 under autocast",
        "dsv3.model.exact_linear:_in_exact_fp32",
        "torch.autocast(..., enabled=False)",
        "torch.autocast(..., enabled=True)",
        MODEL,
    ),
    Mutation(
        "and exact where other matmuls take TF32",
        "dsv3.model.exact_linear:_in_exact_fp32",
        "torch.set_float32_matmul_precision(EXACT)",
        "None",
        MODEL,
    ),
    Mutation(
        "router in fp32 for bf16 input",
        "dsv3.model.router:Router.forward",
        "exact_linear($x.float(), $weight.float())",
        "exact_linear($x, $weight.to($x.dtype)).float()",
        MODEL,
    ),
    Mutation(
        "the selection bias takes part in the choice",
        "dsv3.model.router:Router.select_experts",
        "$scores if $bias is None else $scores + $bias",
        "$scores",
        MODEL,
    ),
    Mutation(
        "and never in the weight",
        "dsv3.model.router:Router.expert_weights",
        "$scores.gather(-1, $experts)",
        "($scores + (0 if self.selection_bias is None else self.selection_bias)).gather(-1, $experts)",
        MODEL,
    ),
    Mutation(
        "weights renormalised where the config says so",
        "dsv3.model.router:Router.expert_weights",
        "if $normalize: ...",
        "if True: ...",
        MODEL,
    ),
    Mutation(
        "with + 1e-20",
        "dsv3.model.router:Router.expert_weights",
        "$weights.sum(-1, keepdim=True) + 1e-20",
        "$weights.sum(-1, keepdim=True)",
        MODEL,
    ),
    Mutation(
        "then scaled",
        "dsv3.model.router:Router.expert_weights",
        "return $weights * $scale",
        "return $weights",
        MODEL,
    ),
    Mutation(
        "group score: sum of the top 2 with a bias",
        "dsv3.model.router:Router.select_experts",
        "1 if $bias is None else 2",
        "1",
        MODEL,
    ),
    Mutation(
        "group score: the maximum without",
        "dsv3.model.router:Router.select_experts",
        "1 if $bias is None else 2",
        "2",
        MODEL,
    ),
    Mutation(
        "closed groups masked with -inf",
        "dsv3.model.router:Router.select_experts",
        "$groups.masked_fill($closed, -torch.inf)",
        "$groups.masked_fill($closed, 0.0)",
        MODEL,
    ),
    Mutation(
        "bias moves against the load",
        "dsv3.training.expert_bias:update_expert_bias",
        "$load.mean() - $load",
        "$load - $load.mean()",
        TRAINING,
    ),
    Mutation(
        "load counted over all ranks",
        "dsv3.training.step:TrainStep",
        "$take($routers, $shape, self.$ranks.sum, ...)",
        "$take($routers, $shape, lambda x: x, ...)",
        SHARDED,
    ),
    Mutation(
        "load added up over microbatches",
        "dsv3.model.transformer:Transformer.record_load",
        "$total += $counts",
        "$total.copy_($counts)",
        TRAINING,
    ),
    Mutation(
        "load not counted again under recomputation",
        "dsv3.model.moe:MoE.forward",
        "$routing: $kind = self.$router($x, $padding)",
        """
$routing: $kind = self.$router($x, $padding)
self.$router.load.add_($routing.stats.load, alpha=0.5)
""",
        MODEL,
    ),
    Mutation(
        "bias update for MTP layers too",
        "dsv3.model.transformer:Transformer.routers",
        "self.modules()",
        "self.layers.modules()",
        f"{MODEL} {TRAINING}",
    ),
    Mutation(
        "balance loss counts raw scores",
        "dsv3.model.router:Router.balance_loss",
        "$scores.detach().topk(...).indices",
        "self.select_experts($scores.detach())",
        MODEL,
    ),
    Mutation(
        "balance loss averages normalised scores",
        "dsv3.model.router:Router.balance_loss",
        "$scores / ($scores.sum(-1, keepdim=True) + 1e-20)",
        "$scores",
        MODEL,
    ),
    Mutation(
        "balance loss per sequence",
        "dsv3.model.router:Router.balance_loss",
        "($frequency * $share).sum(-1).mean()",
        "($frequency.mean(0) * $share.mean(0)).sum(-1)",
        MODEL,
    ),
    Mutation(
        "balance loss of MTP layers too",
        "dsv3.model.transformer:Transformer.predict",
        "$stats = $stats + self.$record($block, $router)",
        "self.$record($block, $router)",
        MODEL,
    ),
    Mutation(
        "padding: counted in no load",
        "dsv3.model.router:Router.forward",
        "$zeros.scatter_add(0, $chosen, $counted)",
        "$zeros.scatter_add(0, $chosen, torch.ones_like($chosen))",
        PADDED,
    ),
    Mutation(
        "padding: not in the balance loss's f",
        "dsv3.model.router:Router.balance_loss",
        "$counted = $counted * $padding.is_token.unsqueeze(-1)",
        "",
        PADDED,
    ),
    Mutation(
        "padding: nor in its P",
        "dsv3.model.router:Router.balance_loss",
        "$normalized.where($padding.is_token.unsqueeze(-1), 0)",
        "$normalized",
        PADDED,
    ),
    Mutation(
        "padding: a sequence is as long as its tokens are many",
        "dsv3.model.router:Router.balance_loss",
        "$padding.lengths.clamp(min=1).unsqueeze(-1)",
        "$padding.lengths.clamp(min=1).unsqueeze(-1).amax()",
        PADDED,
    ),
    Mutation(
        "padding: a row of it alone is no sequence",
        "dsv3.model.padding:PaddingMask.num_sequences",
        "($lengths > 0)",
        "($lengths >= 0)",
        PADDED,
    ),
    Mutation(
        "padding: not in the z-loss",
        "dsv3.model.router:Router.forward",
        "$squares.where($padding.is_token, 0)",
        "$squares",
        PADDED,
    ),
    Mutation(
        "padding: nor in its denominator",
        "dsv3.model.router:Router.forward",
        "$padding.lengths.sum().clamp(min=1)",
        "$padding.is_token.numel()",
        PADDED,
    ),
    Mutation(
        "padding: no expert computes it",
        "dsv3.model.moe:LocalTokenDispatcher.combine",
        "return $out if $padding is None else put_tokens($out, $padding)",
        "return $out",
        PADDED,
    ),
    Mutation(
        "padding: gradients of what is taken go back to their tokens",
        "dsv3.model.padding:_TakeTokens.backward",
        "$put($gradient, $places, $positions)",
        "$put($gradient, $places.flip(0), $positions)",
        PADDED,
    ),
    Mutation(
        "padding: not sent to a rank",
        "dsv3.parallel.token_dispatch:AllToAllTokenDispatcher.dispatch",
        "$routes & $padding.is_token.view(-1, 1)",
        "$routes",
        DISPATCH,
    ),
    Mutation(
        "padding: DeepEP's too",
        "dsv3.parallel.deepep:DeepEPTokenDispatcher.dispatch",
        "$chosen.masked_fill($elsewhere, -1)",
        "$chosen",
        DISPATCH,
    ),
    Mutation(
        "padding: MTP wraps around behind the last token",
        "dsv3.model.transformer:shift_tokens",
        "$ahead % $lengths.clamp(min=1).unsqueeze(-1)",
        "$ahead % tokens.shape[-1]",
        f"{MODEL} {TRAINING}",
    ),
    Mutation(
        "padding: MTP does not route it",
        "dsv3.model.transformer:MTPModule.forward",
        "self.block($x, $rotary, $segments, None, $padding)",
        "self.block($x, $rotary, $segments, None, None)",
        TRAINING,
    ),
    Mutation(
        "padding: sequences counted over microbatches without it",
        "dsv3.training.step:TrainStep",
        "($batch.num_sequences, $batch.num_tokens)",
        "(len($batch.tokens), $batch.num_tokens)",
        TRAINING,
    ),
    Mutation(
        "padding: and tokens",
        "dsv3.training.step:TrainStep",
        "($batch.num_sequences, $batch.num_tokens)",
        "($batch.num_sequences, $batch.tokens.numel())",
        TRAINING,
    ),
    Mutation(
        "padding: a microbatch's share of the z-loss is that of its tokens",
        "dsv3.training.loss:loss_terms",
        "$share($batch.num_tokens, $whole)",
        "$share($batch.num_sequences, $whole)",
        TRAINING,
    ),
    Mutation(
        "padding: evaluation does not route it",
        "dsv3.training.step:LocalForwardBackward.evaluate",
        "self.$model($tokens, $documents, targets=$targets, lengths=$lengths)",
        "self.$model($tokens, $documents, targets=$targets, lengths=None)",
        TRAINING,
    ),
    Mutation(
        "padding: under cp and tp a rank knows its own",
        "dsv3.parallel.context_parallel:join_sequence_shards",
        "partial($take, $model.sequence_shard, $mesh)",
        "partial($take, LocalSequenceShard(), $mesh)",
        SHARDED,
    ),
    Mutation(
        "padding: pipeline stages do not route it",
        "dsv3.parallel.pipeline_parallel:Stage.forward",
        "$model.layer_inputs($tokens, $segments, $cache, $lengths)",
        "$model.layer_inputs($tokens, $segments, $cache, None)",
        SHARDED,
    ),
    Mutation(
        "MTP loss: mean over depths",
        "dsv3.training.loss:head_targets",
        "$weight / $depths / $tokens",
        "$weight / $tokens",
        TRAINING,
    ),
    Mutation(
        "MTP loss: eq. 24's denominator",
        "dsv3.training.loss:head_targets",
        "($weight / $depths / $tokens for $each in $numbers)",
        "($weight / $depths / ($each >= 0).sum().clamp(min=1) for $each in ids[1:])",
        TRAINING,
    ),
    Mutation(
        "MTP joins [embedding, hidden]",
        "dsv3.model.transformer:MTPModule.forward",
        "[self.$norm($embedding), self.$other($hidden)]",
        "[self.$other($hidden), self.$norm($embedding)]",
        MODEL,
    ),
    Mutation(
        "MTP receives the normed hidden state",
        "dsv3.model.transformer:MTPModule.forward",
        "return self.$norm($x), $stats",
        "return $x, $stats",
        MODEL,
    ),
    Mutation(
        "MTP targets stay in their document",
        "dsv3.data.batch:mtp_targets",
        "$targets.masked_fill(~$same, $ignored)",
        "$targets",
        "tests/data",
    ),
    Mutation(
        "RMSNorm eps from the config",
        "dsv3.model.layers:RMSNorm.__init__",
        "self.eps = $eps",
        "self.eps = 1e-6",
        MODEL,
    ),
    Mutation(
        "latent norms have their own eps",
        "dsv3.model.transformer:Block.__init__",
        "$config.latent_norm_eps",
        "$config.norm_eps",
        MODEL,
    ),
    Mutation(
        "norms accumulate in fp32",
        "dsv3.model.layers:RMSNorm.forward",
        "F.rms_norm($x.float(), $shape, $weight.float(), $eps)",
        "F.rms_norm($x, $shape, $weight.to($x.dtype), $eps)",
        MODEL,
    ),
    Mutation(
        "YaRN: mscale squared in the softmax",
        "dsv3.model.rope:softmax_scale",
        "$mscale(...) ** 2",
        "$mscale(...)",
        HF,
    ),
    Mutation(
        "YaRN: cos and sin times the ratio of mscales",
        "dsv3.model.rope:rotary_table",
        "$mscale($factor, $one) / $mscale($factor, $other)",
        "1.0",
        HF,
    ),
    Mutation(
        "YaRN: the ramp's bounds round outwards",
        "dsv3.model.rope:yarn_ramp",
        "math.ceil($bound)",
        "math.floor($bound)",
        f"tests/model/test_rope.py {HF}",
    ),
    Mutation(
        "RoPE pairs are adjacent",
        "dsv3.model.rope:apply_rotary",
        "$x.float().unflatten(-1, (-1, 2)).unbind(-1)",
        "$x.float().chunk(2, -1)",
        HF,
    ),
    Mutation(
        "RoPE tables and rotation in fp32",
        "dsv3.model.rope:rotary_table",
        "torch.stack([$angles.cos(), $angles.sin()], dim=-1)",
        "torch.stack([$angles.cos(), $angles.sin()], dim=-1).bfloat16()",
        HF,
    ),
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
    Mutation(
        "replay: the config is that of the time of the step",
        "dsv3.launch.replayed_run:ReplayedRun.read",
        "replace(stored, config=record.config)",
        "replace(stored)",
        REPLAYED,
    ),
    Mutation(
        "replay: no way leads over steps that a rewind has undone",
        "dsv3.launch.replayed_run:Timeline.holds",
        "Progress.read(checkpoint).samples > max(passed)",
        "max(passed) >= 0",
        REPLAYED,
    ),
    Mutation(
        "replay: the sequences that a rewind passed over are passed over",
        "dsv3.launch.replayed_run:Timeline.first_sample",
        "$after if before <= progress.samples < $after else progress.samples",
        "progress.samples",
        REPLAYED,
    ),
    Mutation(
        "replay: the layout is that of the run unless one is typed",
        "dsv3.launch.replayed_run:ReplayedRun.defaults",
        "LaunchConfig(nproc=world)",
        "LaunchConfig()",
        REPLAYED,
    ),
    Mutation(
        "replay: a step that the run skipped is not computed",
        "dsv3.tasks.replay:_take_steps",
        "number in timeline.skipped and (not is_last)",
        "False",
        REPLAY,
    ),
    Mutation(
        "replay: what the run removes meanwhile is told",
        "dsv3.tasks.replay:_restore",
        "if not run.checkpoint.exists(): ...",
        "if False: ...",
        REPLAY,
    ),
    Mutation(
        "replay: every bit counts where nothing may round otherwise",
        "dsv3.tasks.replay_verdict:judge",
        "if setup.repeats_exactly: ...",
        "if False: ...",
        VERDICT,
    ),
    Mutation(
        "replay: a number that is not finite on one side alone differs",
        "dsv3.tasks.replay_verdict:ComparedStep.difference",
        "0.0 if all(lost) else math.inf",
        "0.0",
        VERDICT,
    ),
    Mutation(
        "network: a store listens on the address given alone",
        "dsv3.distributed.store:listen",
        "bound.bind($address)",
        "bound.bind(('0.0.0.0', port))",
        NETWORK,
    ),
    Mutation(
        "network: gloo and NCCL stay on one node",
        "dsv3.distributed.store:stay_on_this_node",
        "environment.setdefault($variable, $interface)",
        "environment.get(variable)",
        NETWORK,
    ),
    Mutation(
        "network: rank 0 of srun serves its own store",
        "dsv3.distributed.store:rank_store",
        "serve_store(listen($host, $port, ...), ...)",
        "None",
        NETWORK,
    ),
    Mutation(
        "restarts: what would repeat itself is not restarted",
        "dsv3.launch.restarts:_Run._require_restartable",
        "if isinstance($failure, UserError | RunOver): ...",
        "if False: ...",
        RESTARTS,
    ),
    Mutation(
        "restarts: they count while no new checkpoint comes",
        "dsv3.launch.restarts:_Run._restart",
        "if $newest > self.step: ...",
        "if False: ...",
        RESTARTS,
    ),
    Mutation(
        "restarts: an attempt resumes the run",
        "dsv3.launch.restarts:_Run.job_of",
        "replace($config.run, dir=$directory, resume=True)",
        "job.config.run",
        RESTARTS,
    ),
    Mutation(
        "restarts: the cause is told, not its consequence",
        "dsv3.launch.restarts:_Run.next_attempt",
        "_most_telling(...)",
        "failure",
        RESTARTS,
    ),
    Mutation(
        "rendezvous: nothing but what node 0 writes begins an attempt",
        "dsv3.launch.rendezvous:Rendezvous.wait",
        "not all((type($n) is int and $n in $known for $n in $nodes))",
        "False",
        RESTARTS,
    ),
    Mutation(
        "a saved dataset among files is no text",
        "dsv3.documents.input_files:find_files",
        "is_saved(Path($folder.path))",
        "False",
        DOCUMENTS,
    ),
    Mutation(
        "a pipe among files is never opened",
        "dsv3.documents.input_files:find_files",
        "S_ISREG($stat.st_mode) or S_ISDIR($stat.st_mode)",
        "True",
        DOCUMENTS,
    ),
    Mutation(
        "the split that is read is told",
        "dsv3.documents.table_files:choose_split",
        "tell($text)",
        "None",
        DOCUMENTS,
    ),
    Mutation(
        "an array of JSON that is cut off is damaged",
        "dsv3.documents.json_values:JsonValues.__iter__",
        "is_array and $first != b']'",
        "False",
        DOCUMENTS,
    ),
    Mutation(
        "a bracket within a string of JSON ends nothing",
        "dsv3.documents.json_values:JsonValues.scan",
        "self._in_string = True",
        "self._in_string = False",
        DOCUMENTS,
    ),
    Mutation(
        "a NUL character makes a document none wherever it lies",
        "dsv3.documents.document_files:_no_text",
        "'\\0' in $text",
        "False",
        DOCUMENTS,
    ),
    Mutation(
        "shards written since the run began are compared with their digests",
        "dsv3.data.token_shards:PreparedShards.verify_newer",
        "Path($name).stat().st_mtime > $since",
        "False",
        "tests/data/test_token_shards.py",
    ),
    Mutation(
        "a refused prepare leaves nothing",
        "dsv3.tokens.prepare_shards:claimed_output",
        "$folder.rmdir()",
        "None",
        "tests/tasks/test_prepare.py",
    ),
    Mutation(
        "an output is written to before the input is read",
        "dsv3.tasks.prepare:PrepareTask.prepare",
        "with claimed_output($output, $key): ...",
        "if True: ...",
        "tests/tasks/test_prepare.py",
    ),
    Mutation(
        "padding of a step is a share of its places",
        "dsv3.training.step:TrainStep._padding",
        "1 - $share",
        "0 * $share",
        TRAINING,
    ),
    Mutation(
        "nothing is saved while ranks differ",
        "dsv3.checkpoint.manager:CheckpointManager.save",
        "self.replicas.compare($parts, $optimizer, $progress)",
        "",
        REPLICAS,
    ),
    Mutation(
        "plain tensors, such as expert biases, are compared",
        "dsv3.checkpoint.replicas:replica_groups",
        "$replicated or $shared or not isinstance($tensor, DTensor)",
        "$replicated or $shared",
        REPLICAS,
    ),
    Mutation(
        "weights and moments of HSDP's replicas are compared",
        "dsv3.checkpoint.replicas:replica_groups",
        "any(...)",
        "False",
        REPLICAS,
    ),
    Mutation(
        "the embedding of the first and of the last stage are compared",
        "dsv3.checkpoint.replicas:_is_on_two_stages",
        "return $head or getattr(...)",
        "return False",
        REPLICAS,
    ),
    Mutation(
        "a checksum notices exchanged words",
        "dsv3.checkpoint.bit_sums:checksum",
        "$part.to(torch.int64) * weights(...)",
        "$part.to(torch.int64)",
        "tests/checkpoint/test_bit_sums.py",
    ),
    Mutation(
        "a group notices exchanged tensors",
        "dsv3.checkpoint.replicas:ReplicaGroup.checksum",
        "checksum($words) * _odd($name)",
        "checksum($words)",
        "tests/checkpoint/test_bit_sums.py",
    ),
    Mutation(
        "the slowest rank is the one that waits least",
        "dsv3.training.stragglers:find_straggler",
        "median_high($waits) - own.waited",
        "own.waited - median_high($waits)",
        STRAGGLERS,
    ),
    Mutation(
        "a rank that is slow once is not named",
        "dsv3.training.stragglers:StragglerWatch._judge",
        "self._windows < WINDOWS or $rarely",
        "$rarely",
        STRAGGLERS,
    ),
    Mutation(
        "waits of other threads are not the step's",
        "dsv3.distributed.step_waits:StepWaits._timed",
        "self._thread != threading.get_ident()",
        "self._thread is None",
        STRAGGLERS,
    ),
    Mutation(
        "blocks of a remote file are of one version",
        "dsv3.tokens.remote_files:RemoteArray._look",
        "self._seen is not None and self._seen[0] != $version",
        "False",
        "tests/tokens/test_remote_files.py",
    ),
    Mutation(
        "an entry of the cache is compared with its seal",
        "dsv3.tokens.cache:read_entry",
        "sealed and not _VERIFIED.get()",
        "False",
        "tests/data/test_cache_damage.py",
    ),
    Mutation(
        "no id is read once damage has been found",
        "dsv3.tokens.background_check:BackgroundCheck.require_sound",
        "if self.damage: ...",
        "if False: ...",
        "tests/data/test_cache_damage.py",
    ),
    Mutation(
        "messages are short whatever is put into them",
        "dsv3.errors:shortened",
        "len(text) <= LONGEST_MESSAGE",
        "True",
        "tests/faults/test_corruptions.py",
    ),
    Mutation(
        "a full disk is told as a mistake",
        "dsv3.errors:refused_by_system",
        "code in _FULL",
        "False",
        "tests/faults/test_full_disk.py",
    ),
    Mutation(
        "files: a pipe that has taken a file's place is refused",
        "dsv3.untrusted_files:open_descriptor",
        "_require_regular(path, os.fstat(descriptor))",
        "None",
        FILES,
    ),
    Mutation(
        "files: no more is read than the limit and a byte",
        "dsv3.untrusted_files:read_bytes",
        "file.read(limit + 1)",
        "file.read()",
        FILES,
    ),
    Mutation(
        "files: values of JSON are counted before they are made",
        "dsv3.untrusted_files:parse_json",
        "sum(map(text.count, ',[{:')) > limits.nodes",
        "False",
        FILES,
    ),
    Mutation(
        "files: a number of JSON has so many digits at most",
        "dsv3.untrusted_files:_whole_number",
        "len(digits) > LONGEST_NUMBER",
        "False",
        FILES,
    ),
    Mutation(
        "files: a number of YAML has so many digits at most",
        "dsv3.untrusted_files:_BoundedLoader.compose_node",
        "len(node.value) > LONGEST_NUMBER",
        "False",
        FILES,
    ),
    Mutation(
        "files: YAML is nested only so deep",
        "dsv3.untrusted_files:_BoundedLoader.compose_node",
        "self.depth > self.limits.depth",
        "False",
        FILES,
    ),
    Mutation(
        "files: values of YAML are counted",
        "dsv3.untrusted_files:_BoundedLoader._count",
        "self.nodes > self.limits.nodes",
        "False",
        FILES,
    ),
    Mutation(
        "files: a key that comes twice is refused",
        "dsv3.untrusted_files:_unique_keys",
        "len(found) < len(pairs)",
        "False",
        FILES,
    ),
    Mutation(
        "files: a name cannot steer a terminal",
        "dsv3.untrusted_files:BadFile.__init__",
        "char if char.isprintable() else '\\ufffd'",
        "char",
        FILES,
    ),
    Mutation(
        "files: another reader gets no YAML beyond the limits",
        "dsv3.untrusted_files:require_bounded_yaml",
        "raise _no_yaml(error, path) from None",
        "return",
        FILES,
    ),
    Mutation(
        "files: nothing is appended to a pipe in a run directory",
        "dsv3.untrusted_files:require_no_pipes",
        "_require_regular(entry.path, entry.stat())",
        "None",
        "tests/untrusted/test_entrances.py -k nothing_can_be_written",
    ),
    Mutation(
        "limits: they count below zero too",
        "dsv3.config.limits:require_within",
        "-limit <= number <= limit",
        "number <= limit",
        f"{NUMBERS} -k both_ways",
    ),
    Mutation(
        "limits: numbers in a list count",
        "dsv3.config.limits:require_within",
        "value if isinstance(value, list | tuple) else [value]",
        "[value]",
        f"{NUMBERS} -k both_ways",
    ),
    Mutation(
        "limits: whole numbers that floats count exactly",
        "dsv3.config.limits:most",
        "WHOLE if kind is int else REAL",
        "REAL",
        f"{NUMBERS} -k both_ways",
    ),
    Mutation(
        "limits: typed numbers are compared with the table",
        "dsv3.config.strict",
        "require_within(type(node), field.name, key, value)",
        "None",
        f"{NUMBERS} -k typed_numbers",
    ),
    Mutation(
        "limits: layers and experts are bounded together",
        "dsv3.config.model",
        "EXPERTS // max(self.num_moe_layers, 1)",
        "EXPERTS",
        f"{NUMBERS} -k bounded_together",
    ),
    Mutation(
        "lock: the second comer is refused",
        "dsv3.distributed.directory_lock:DirectoryLock.take",
        "not self._acquired()",
        "False",
        f"{LOCK} -k second_comer",
    ),
    Mutation(
        "lock: workers of a killed holder are waited for",
        "dsv3.distributed.directory_lock:DirectoryLock.take",
        "holder.get('alive') or time.monotonic() > deadline",
        "True",
        f"{LOCK} -k who_waits",
    ),
    Mutation(
        "lock: workers hold it too",
        "dsv3.distributed.directory_lock:DirectoryLock.__getstate__",
        "DupFd(self.descriptor) if self.descriptor is not None and get_spawning_popen() else None",
        "None",
        f"{LOCK} -k workers_of_a_killed",
    ),
    Mutation(
        "lock: a directory that was made for nothing goes again",
        "dsv3.distributed.directory_lock:DirectoryLock._tidy",
        "path.rmdir()",
        "None",
        f"{LOCK} -k made_for_nothing",
    ),
    Mutation(
        "lock: one that something has come into stays",
        "dsv3.distributed.directory_lock:DirectoryLock._tidy",
        "{path.name for path in self.directory.iterdir()} <= {LOCK_FILE}",
        "True",
        f"{LOCK} -k made_for_nothing",
    ),
    Mutation(
        "lock: a note cannot steer a terminal",
        "dsv3.distributed.directory_lock:_shown",
        "char if char.isprintable() else '?'",
        "char",
        f"{LOCK} -k message_is_short",
    ),
    Mutation(
        "lock: a file system without locks lets a command go on",
        "dsv3.distributed.directory_lock:has_no_locks",
        "getattr(error, 'errno', None) in _NO_LOCKS",
        "False",
        f"{LOCK} -k no_locks",
    ),
    Mutation(
        "lock: a run owns its directory",
        "dsv3.launch.run_dir:own_run_dir",
        "lock.take()",
        "None",
        "tests/launch/test_owned_run_dir.py -k who_owns",
    ),
    Mutation(
        "network: a name that means the loopback only here is bound to all",
        "dsv3.distributed.store:listen",
        "loops and not _is_local_name(host)",
        "False",
        f"{NETWORK} -k only_here",
    ),
    Mutation(
        "network: a port that is taken is told with the remedy",
        "dsv3.distributed.store:listen",
        "error.errno == errno.EADDRINUSE",
        "False",
        f"{NETWORK} -k cannot_be_listened",
    ),
    Mutation(
        "signals: the second ends the process",
        "dsv3.distributed.signals:StopRequest.hear",
        "self._heard > 1",
        "False",
        f"{SIGNALS} -k second_signal",
    ),
    Mutation(
        "signals: one that was ignored stays so",
        "dsv3.distributed.signals:heeded",
        "signal.getsignal(number) not in (signal.SIG_IGN, None)",
        "True",
        f"{SIGNALS} -k was_ignored",
    ),
    Mutation(
        "signals: a worker obeys its launcher alone",
        "dsv3.distributed.signals:obey_launcher_alone",
        "number != signal.SIGTERM",
        "False",
        f"{SIGNALS} -k obeys_its_launcher",
    ),
    Mutation(
        "signals: SIGUSR1 asks to save",
        "dsv3.distributed.signals:StopRequest.hear",
        "self.save_requested = True",
        "pass",
        f"{SIGNALS} -k asks_to_save",
    ),
    Mutation(
        "signals: a save that was asked for is taken once",
        "dsv3.distributed.signals:StopSignal.take_save",
        "saves, self._saves = self._saves, False",
        "saves = self._saves",
        f"{SIGNALS} -k asks_to_save",
    ),
    Mutation(
        "signals: a group's are left to the command by its children",
        "dsv3.distributed.signals:heard_by",
        "signal.pthread_sigmask(signal.SIG_BLOCK, _GROUP_SIGNALS)",
        "signal.pthread_sigmask(signal.SIG_BLOCK, [])",
        f"{SIGNALS} -k leave_a_group",
    ),
    Mutation(
        "signals: when all is done a stop changes nothing",
        "dsv3.distributed.signals:Leave.__call__",
        "self.over()",
        "False",
        f"{SIGNALS} -k when_all_is_done",
    ),
    Mutation(
        "signals: work whose ranks advance together ends early",
        "dsv3.distributed.signals:must_stop_early",
        "bool(_listeners) and _listeners[-1].poll()",
        "False",
        f"{SIGNALS} -k advance_together",
    ),
    Mutation(
        "signals: a launcher remembers the stop",
        "dsv3.launch.worker_signals:WorkerSignals.hear",
        "self.asked = True",
        "pass",
        "tests/launch/test_worker_signals.py -k reaches_every_worker",
    ),
    Mutation(
        "signals: a launcher kills its workers alone",
        "dsv3.launch.worker_signals:WorkerSignals._kill",
        "kill_children(self.others)",
        "kill_children(())",
        "tests/launch/test_worker_signals.py -k before_all_workers",
    ),
    Mutation(
        "rendezvous: a node that does not come is named",
        "dsv3.launch.rendezvous:Rendezvous.meet",
        "missing and number == 0",
        "False",
        f"{RESTARTS} -k not_come_at_all",
    ),
    Mutation(
        "rendezvous: a mistake of one node is told as a mistake on all",
        "dsv3.launch.rendezvous:_as_error",
        "end.get('failure') in ('UserError', 'InvalidValue')",
        "False",
        f"{RESTARTS} -k mistake_on_one_node",
    ),
    Mutation(
        "restarts: a run without its config begins anew",
        "dsv3.launch.restarts:_Run._restart",
        "(directory / CONFIG_FILE).is_file()",
        "True",
        f"{RESTARTS} -k without_its_config",
    ),
    Mutation(
        "restarts: there is a pause between those without progress",
        "dsv3.launch.restarts:_Run._restart",
        "0.0 if self.used == 1 else min(...)",
        "0.0",
        f"{RESTARTS} -k stop_between",
    ),
    Mutation(
        "restarts: the log of the run tells them",
        "dsv3.launch.restarts:_Run.job_of",
        "notes = [restart_line(restart)]",
        "notes = []",
        f"{RESTARTS} -k newest_checkpoint_and_told",
    ),
    Mutation(
        "restarts: they tell which nodes are missing",
        "dsv3.launch.restarts:restart_line",
        "restart.get('missing') or []",
        "[]",
        f"{RESTARTS} -k is_done_without",
    ),
    Mutation(
        "replay: the weights that a run began with are the same",
        "dsv3.launch.replayed_run:ReplayedRun.require_begin",
        "before is not None and before != now",
        "False",
        f"{REPLAYED} -k began_with",
    ),
    Mutation(
        "replay: rows in the order of older code are not known",
        "dsv3.launch.replayed_run:ReplayedRun.require_one_stretch",
        "record.row_order != ROW_ORDER",
        "False",
        f"{REPLAYED} -k older_code",
    ),
    Mutation(
        "replay: one config leads to the step",
        "dsv3.launch.replayed_run:ReplayedRun.require_one_stretch",
        "if between: ...",
        "if False: ...",
        f"{REPLAYED} -k way_is_gone",
    ),
    Mutation(
        "replay: a later change is told by a checkpoint",
        "dsv3.launch.replayed_run:ReplayedRun.require_one_stretch",
        "if after: ...",
        "if False: ...",
        f"{REPLAYED} -k way_is_gone",
    ),
    Mutation(
        "replay: the data are those of the time of the step",
        "dsv3.launch.replayed_run:ReplayedRun.read",
        "_fingerprint_at(record, step)",
        "record.data_fingerprint",
        f"{REPLAYED} -k changed_later",
    ),
    Mutation(
        "replay: ranks of another layout are not those of the step",
        "dsv3.launch.replayed_run:ReplayedRun.read",
        "same and type(world) is int and world > 0",
        "type(world) is int and world > 0",
        f"{REPLAYED} -k another_layout",
    ),
    Mutation(
        "replay: the coarser of two precisions says what rounding explains",
        "dsv3.tasks.replay_verdict:coarsest",
        "max(..., key=order.index, default=order[-1])",
        "min((each for each in precisions if each in ROUNDING), key=order.index, default=order[-1])",
        VERDICT,
    ),
    Mutation(
        "replay: a spike repeats where the norm is above the limit again",
        "dsv3.tasks.replay_verdict:_is_bad_again",
        "norm > limit",
        "norm > 0",
        VERDICT,
    ),
    Mutation(
        "replay: a finer precision with the same accident clears the numerics",
        "dsv3.tasks.replay_verdict:_judge_accident",
        "is_finer(setup.precision, setup.run_precision)",
        "False",
        VERDICT,
    ),
    Mutation(
        "replay: a run that ended at a bad number has that accident",
        "dsv3.tasks.replay_verdict:find_accident",
        "row.grad_norm is None or (row.loss is None and has_loss)",
        "False",
        VERDICT,
    ),
    Mutation(
        "replay: tf32 is a precision of its own",
        "dsv3.tasks.replay_verdict:matmul_precision",
        "choice == 'fp32' and isinstance(node, Mapping) and node.get('matmul') == 'high'",
        "False",
        VERDICT,
    ),
    Mutation(
        "replay: the step at which a difference began is told",
        "dsv3.tasks.replay_verdict:_hardware",
        "since == step",
        "True",
        VERDICT,
    ),
    Mutation(
        "replicas: steps, samples and statistics are compared",
        "dsv3.checkpoint.replicas:replica_groups",
        "_of_progress(progress)",
        "()",
        f"{REPLICAS} -k hsdp",
    ),
    Mutation(
        "replicas: the optimizer's settings are compared",
        "dsv3.checkpoint.replicas:replica_groups",
        "[*model_state([part]), *optimizer_state([part], optimizer), *_settings(part, optimizer)]",
        "[*model_state([part]), *optimizer_state([part], optimizer)]",
        f"{REPLICAS} -k hsdp",
    ),
    Mutation(
        "replicas: ranks that differ are not saved",
        "dsv3.checkpoint.manager",
        "self.replicas.compare(model_parts, optimizer, progress)",
        "None",
        f"{REPLICAS} -k refused_on_all",
    ),
    Mutation(
        "replicas: words that fill no row are summed",
        "dsv3.checkpoint.bit_sums:checksum",
        "zip(found, (0, _COLUMN_SEED, _TAIL_SEED), strict=True)",
        "zip(found[:2], (0, _COLUMN_SEED), strict=True)",
        "tests/checkpoint/test_bit_sums.py",
    ),
    Mutation(
        "replicas: several flipped bits have no one name",
        "dsv3.checkpoint.bit_sums:_bit",
        "change.bit_count() == 1",
        "True",
        "tests/checkpoint/test_bit_sums.py",
    ),
    Mutation(
        "resume: the random state comes back",
        "dsv3.checkpoint.restore:restore_training",
        "torch.set_rng_state(generator)",
        "None",
        "tests/checkpoint/test_manager.py -k random_state",
    ),
    Mutation(
        "resume: another optimizer's state is refused",
        "dsv3.checkpoint.restore:restore_training",
        "_require_state(state, stored, directory, ranks)",
        "None",
        "tests/checkpoint/test_optimizer_state.py -k another_optimizer",
    ),
    Mutation(
        "statistics: stored numbers are finite",
        "dsv3.checkpoint.run_statistics:_is_number",
        "isinstance(value, float) and math.isfinite(value)",
        "isinstance(value, float)",
        f"{WATCH} -k hostile",
    ),
    Mutation(
        "statistics: their names are known",
        "dsv3.checkpoint.run_statistics:RunStatistics.from_json",
        "any(name not in known for name in stored)",
        "False",
        f"{WATCH} -k hostile",
    ),
    Mutation(
        "statistics: their lists are bounded",
        "dsv3.checkpoint.run_statistics:RunStatistics.from_json",
        "len(values) <= ITEMS",
        "True",
        f"{WATCH} -k hostile",
    ),
    Mutation(
        "statistics: True is no count",
        "dsv3.checkpoint.run_statistics:_is_count",
        "type(value) is int",
        "isinstance(value, int)",
        f"{WATCH} -k hostile",
    ),
    Mutation(
        "statistics: a loss above its past is a doubt before it is an alarm",
        "dsv3.checkpoint.run_statistics:RunStatistics.in_doubt",
        "self.above_since is not None or self.alarm or self.held_out_lost",
        "self.alarm or self.held_out_lost",
        f"{WATCH} -k in_doubt",
    ),
    Mutation(
        "pickle: a text is no longer than a path",
        "dsv3.checkpoint.metadata_pickle:_push_text",
        "length > _LONGEST_TEXT or end > len(raw)",
        "False",
        PICKLE,
    ),
    Mutation(
        "pickle: a number has so many bytes at most",
        "dsv3.checkpoint.metadata_pickle:_load",
        "length > _LONGEST_NUMBER",
        "False",
        PICKLE,
    ),
    Mutation(
        "pickle: attributes are set of records alone",
        "dsv3.checkpoint.metadata_pickle:_load",
        "isinstance(stack[-1], Record)",
        "True",
        PICKLE,
    ),
    Mutation(
        "pickle: objects are made of records alone",
        "dsv3.checkpoint.metadata_pickle:_new",
        "isinstance(kind, type) and issubclass(kind, Record)",
        "True",
        PICKLE,
    ),
    Mutation(
        "pickle: no object is made with arguments",
        "dsv3.checkpoint.metadata_pickle:_load",
        "stack.pop() != ()",
        "stack.pop() is None and False",
        PICKLE,
    ),
    Mutation(
        "pickle: items are set in a dict alone",
        "dsv3.checkpoint.metadata_pickle:_set_items",
        "begin < 1 or type(target) is not dict",
        "False",
        PICKLE,
    ),
    Mutation(
        "archive: the pickle of a tensor is read before torch reads it",
        "dsv3.checkpoint.tensor_archive:require_tensor_archive",
        "load_records(_content(file, pickles[0]), _stand_in)",
        "None",
        ARCHIVE,
    ),
    Mutation(
        "archive: the pickle of a tensor is short",
        "dsv3.checkpoint.tensor_archive:require_tensor_archive",
        "sum(entry.size for entry in entries) > length or pickles[0].size > _LONGEST_PICKLE",
        "False",
        ARCHIVE,
    ),
    Mutation(
        "archive: there is one object in it",
        "dsv3.checkpoint.tensor_archive:require_tensor_archive",
        "len(pickles) != 1 or len({entry.name for entry in entries}) < len(entries)",
        "False",
        ARCHIVE,
    ),
    Mutation(
        "archive: it has so many files at most",
        "dsv3.checkpoint.tensor_archive:_directory",
        "count <= _MOST_FILES and first >= 0 and size <= len(tail) - first",
        "True",
        ARCHIVE,
    ),
    Mutation(
        "archive: nothing stands behind its end",
        "dsv3.checkpoint.tensor_archive:_directory",
        "end < 0 or tail[end:end + 4] != b'PK\\x05\\x06'",
        "end < 0",
        ARCHIVE,
    ),
    Mutation(
        "accidents: a shorter window keeps the newest norms",
        "dsv3.training.step_guard:StepGuard.load",
        "statistics.norms[-self.window:]",
        "statistics.norms[:self.window]",
        GUARD,
    ),
    Mutation(
        "accidents: without train.accidents.skip nothing is skipped",
        "dsv3.training.step_guard:StepGuard.judge",
        "~good & self.config.skip",
        "~good",
        GUARD,
    ),
    Mutation(
        "accidents: the host asks where the optimizer cannot skip",
        "dsv3.training.step_guard:StepGuard.__init__",
        "device.type == 'cpu' or elsewhere or not takes_found_inf(optimizer)",
        "device.type == 'cpu' or elsewhere",
        GUARD,
    ),
    Mutation(
        "accidents: the loss of a skipped step counts",
        "dsv3.training.accidents:AccidentWatch.__call__",
        "row.loss is not None and math.isfinite(row.loss)",
        "row.loss is not None and math.isfinite(row.loss) and kind == GOOD",
        WATCH,
    ),
    Mutation(
        "accidents: a held-out loss that is not finite is an alarm",
        "dsv3.training.accidents:AccidentWatch._watch_evaluation",
        "self.statistics.held_out_lost = lost",
        "pass",
        WATCH,
    ),
    Mutation(
        "accidents: weights that are not finite end the run",
        "dsv3.training.accidents:AccidentWatch._note_skipped",
        "self._nonfinite_weights() if kind == NONFINITE else []",
        "[]",
        WATCH,
    ),
    Mutation(
        "accidents: a loss above that of guessing is above its past",
        "dsv3.training.accidents:AccidentWatch._watch_loss",
        "self._guessing if statistics.lowest is None else statistics.lowest",
        "math.inf if statistics.lowest is None else statistics.lowest",
        WATCH,
    ),
    Mutation(
        "accidents: an alarm takes so many steps in a row",
        "dsv3.training.accidents:AccidentWatch._watch_loss",
        "step - statistics.above_since + 1 >= config.alarm_steps",
        "True",
        WATCH,
    ),
    Mutation(
        "accidents: a run that learnt nothing says so",
        "dsv3.training.accidents:AccidentWatch.finish",
        "steps >= _LEARNT * window and math.fsum(losses) / window > self._guessing - _BETTER",
        "False",
        WATCH,
    ),
    Mutation(
        "accidents: a run whose steps were all skipped has failed",
        "dsv3.training.accidents:AccidentWatch.finish",
        "0 < steps <= self.statistics.skipped",
        "False",
        f"{RUNS} -k all_skipped",
    ),
    Mutation(
        "accidents: without skip the held-out loss is looked at too",
        "dsv3.training.accidents:AccidentWatch._require_finite",
        "(row.loss, row.grad_norm, row.evaluation_loss)",
        "(row.loss, row.grad_norm)",
        WATCH,
    ),
    Mutation(
        "accidents: a run that has used its rewinds ends",
        "dsv3.training.accidents:AccidentWatch._goes_back",
        "self.statistics.rewinds >= self.config.max_rewinds",
        "False",
        f"{RUNS} -k used_its_rewinds",
    ),
    Mutation(
        "rewind: it goes to before the rise",
        "dsv3.training.rewind:Rewinder.rewind",
        "self.watch.statistics.above_since or run.step",
        "run.step",
        REWIND,
    ),
    Mutation(
        "rewind: callbacks are told",
        "dsv3.training.rewind:Rewinder.rewind",
        "callback.on_rewind(run)",
        "None",
        REWIND,
    ),
    Mutation(
        "rewind: the statistics are those of the checkpoint",
        "dsv3.training.rewind:Rewinder.rewind",
        "self.watch.go_back(progress)",
        "None",
        REWIND,
    ),
    Mutation(
        "rewind: the norms are those of the checkpoint",
        "dsv3.training.accidents:AccidentWatch.go_back",
        "self.guard.load(self.statistics)",
        "None",
        REWIND,
    ),
    Mutation(
        "accidents: experts are named by their number in the model",
        "dsv3.training.gradient_places:GradientPlaces.__init__",
        "local_shape_and_offset(whole)[1][0] if isinstance(whole, DTensor) else 0",
        "0",
        f"{SKIPPED} -k hsdp",
    ),
    Mutation(
        "accidents: the largest gradient is named first",
        "dsv3.training.gradient_places:ranked",
        "-place.norm",
        "place.norm",
        f"{REPLAY} -k spike_repeats",
    ),
    Mutation(
        "accidents: of bad gradients the one nearest to the loss is named first",
        "dsv3.training.gradient_places:ranked",
        "sorted(known.values(), key=$key, reverse=True)",
        "sorted(known.values(), key=$key)",
        f"{REPLAY} -k bad_batch",
    ),
    Mutation(
        "stragglers: a rank is compared with its own stage",
        "dsv3.training.stragglers:find_straggler",
        "times[first:first + per_stage] if per_stage > 1 else times",
        "times",
        STRAGGLERS,
    ),
    Mutation(
        "stragglers: a slow device is found by its probe",
        "dsv3.training.stragglers:find_straggler",
        "own.probe > 0",
        "False",
        STRAGGLERS,
    ),
    Mutation(
        "stragglers: the data is the cause where it is most of the wait",
        "dsv3.training.stragglers:find_straggler",
        "for_data > late / 2 and late > 0",
        "for_data > 0",
        STRAGGLERS,
    ),
    Mutation(
        "stragglers: they are told ever more rarely",
        "dsv3.training.stragglers:StragglerWatch._judge",
        "self._windows < WINDOWS or self._windows & (self._windows - 1)",
        "self._windows < WINDOWS",
        STRAGGLERS,
    ),
    Mutation(
        "stragglers: reductions between steps do not count",
        "dsv3.distributed.step_waits:StepWaits._mark",
        "self._on_gpu and self._thread is not None",
        "self._on_gpu",
        STRAGGLERS,
    ),
    Mutation(
        "digests: a list knows its own",
        "dsv3.tokens.file_digests:decode_entries",
        "content['digest'] != _digest_of(files)",
        "False",
        MANIFEST,
    ),
    Mutation(
        "digests: a list points to nothing outside",
        "dsv3.tokens.file_digests:_name",
        "not path.parts or path.is_absolute() or '..' in path.parts",
        "False",
        MANIFEST,
    ),
    Mutation(
        "digests: the kind is the one that is compared",
        "dsv3.tokens.file_digests:decode_entries",
        "content['algorithm'] != _ALGORITHM",
        "False",
        MANIFEST,
    ),
    Mutation(
        "cache: an entry is compared at start",
        "dsv3.tokens.cache_seal:check_seal",
        "if wrong: ...",
        "if False: ...",
        f"{CACHE} -k any_file_of_any_entry",
    ),
    Mutation(
        "cache: the rest of an entry is compared while the run goes on",
        "dsv3.tokens.cache_seal:check_seal",
        "BACKGROUND.add(left)",
        "None",
        f"{CACHE} -k too_large",
    ),
    Mutation(
        "cache: a marked entry is made anew",
        "dsv3.tokens.cache_seal:_read_seal",
        "(directory / DAMAGE_FILE).exists()",
        "False",
        f"{CACHE} -k too_large",
    ),
    Mutation(
        "cache: what is compared at start is bounded",
        "dsv3.tokens.background_check:check_at_start",
        "read > nbytes",
        "False",
        f"{CACHE} -k too_large",
    ),
    Mutation(
        "cache: damage that the thread finds marks the entry",
        "dsv3.tokens.background_check:BackgroundCheck._run",
        "file.on_damage is not None",
        "False",
        f"{CACHE} -k too_large",
    ),
    Mutation(
        "restarts: nothing that an attempt held is held in the next",
        "dsv3.launch.restarts:_attempts",
        "error.__traceback__ = error.__context__ = None",
        "pass",
        f"{RESTARTS} -k restarts_count",
    ),
]


def caught_by(mutation: Mutation, copy: Path) -> str | None:
    """Return the first test that fails with the mutation in place; None if all pass."""
    path = copy / mutation.file
    text = path.read_text()
    path.write_text(mutation.apply(text))
    try:
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-x",
            "-q",
            "-p",
            "no:cacheprovider",
            *mutation.tests.split(),
        ]
        done = subprocess.run(command, cwd=copy, capture_output=True, text=True, check=False)
    finally:
        path.write_text(text)
    found = re.search(r"^(?:FAILED|ERROR) (\S+::\S+)", done.stdout, re.MULTILINE)
    if done.returncode and not found:
        raise SystemExit(
            f"{mutation.rule}: the tests did not run\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
        )
    return found[1].split("[")[0] if found else None


def stored(path: Path) -> dict[str, str | None]:
    """Return what earlier runs have found, by rule."""
    if not path.is_file():
        return {}
    return {entry["rule"]: entry["caught_by"] for entry in json.loads(path.read_text())}


def summary(results: dict[str, str | None]) -> list[str]:
    """Return the lines of docs/numerics.md: how many rules a test holds, and the rules that none does."""
    missed = [rule for rule, test in results.items() if not test]
    link = "[mutations.json](../benchmarks/results/mutations.json)"
    return [
        f"Tests catch {len(results) - len(missed)} of the {len(results)} broken rules.",
        f"{link} has each rule, its edit and the test that catches it.",
        *(f"- **no test catches:** {rule}" for rule in missed),
    ]


def main() -> int:
    """Try every mutation, print and store the results, write their summary into docs/numerics.md."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument(
        "--only",
        default="",
        help="rules that hold this (regular expression); the others keep their last result",
    )
    parser.add_argument("--new", action="store_true", help="rules that have no result yet")
    parser.add_argument("--json", type=Path, default=RESULT)
    options = parser.parse_args()
    chosen = [mutation for mutation in MUTATIONS if re.search(options.only, mutation.rule, re.IGNORECASE)]
    known: list[Mutation] = []
    results = stored(options.json)
    if options.new:
        chosen = [mutation for mutation in chosen if not results.get(mutation.rule)]
    with tempfile.TemporaryDirectory() as scratch:
        copy = Path(scratch) / "dsv3"
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".venv", ".git", "outputs"), symlinks=True)
        for mutation in chosen:
            results[mutation.rule] = caught_by(mutation, copy)
            print(f"{mutation.rule:<50} {results[mutation.rule] or 'NOT CAUGHT'}", flush=True)
            known = [mutation for mutation in MUTATIONS if mutation.rule in results]
            report = [asdict(mutation) | {"caught_by": results[mutation.rule]} for mutation in known]
            options.json.write_text(json.dumps(report, indent=1) + "\n")
    lines = summary({mutation.rule: results[mutation.rule] for mutation in known})
    print("", *lines, sep="\n")
    if options.json == RESULT:
        fill("numerics.md", "mutations", lines)
    return 0 if all(results[mutation.rule] for mutation in chosen) else 1


if __name__ == "__main__":
    sys.exit(main())
