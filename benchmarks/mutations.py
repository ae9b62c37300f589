"""Breaks each numerics rule on purpose, in a copy of the project, and records which test notices.

A mutation replaces one piece of text; it counts as caught when a test of the named folders fails. The
table goes into docs/numerics.md. A rule that no test holds makes the command exit with 1.

    python -m benchmarks.mutations
    python -m benchmarks.mutations --only yarn
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

from benchmarks.pages import fill

ROOT = Path(__file__).resolve().parent.parent
RESULT = Path(__file__).resolve().parent / "results" / "mutations.json"
MODEL, HF = "tests/model", "tests/hf"
TRAINING, SHARDED = "tests/training", "tests/parallel/test_parity.py"
PRECISION = " ".join(
    f"tests/fp8/test_{name}.py"
    for name in ("tiles", "engine", "operators", "fp8", "scaled_mm", "split", "check")
)


@dataclass
class Mutation:
    """One rule, and the edit that breaks it."""

    rule: str
    file: str
    old: str
    new: str
    tests: str


MUTATIONS = [
    Mutation("router in fp32 under autocast", "dsv3/model/router.py", "enabled=False", "enabled=True", MODEL),
    Mutation(
        "router in fp32 for bf16 input",
        "dsv3/model/router.py",
        "F.linear(x.float(), self.weight.float())",
        "F.linear(x, self.weight.to(x.dtype)).float()",
        MODEL,
    ),
    Mutation(
        "the selection bias takes part in the choice",
        "dsv3/model/router.py",
        "scores if self.selection_bias is None else scores + self.selection_bias",
        "scores",
        MODEL,
    ),
    Mutation(
        "and never in the weight",
        "dsv3/model/router.py",
        "weights = scores.gather(-1, experts)",
        "weights = (scores + (0 if self.selection_bias is None else self.selection_bias)).gather(-1, experts)",
        MODEL,
    ),
    Mutation(
        "weights renormalised where the config says so",
        "dsv3/model/router.py",
        "if self.config.normalize_top_k:",
        "if True:",
        MODEL,
    ),
    Mutation(
        "with + 1e-20",
        "dsv3/model/router.py",
        "weights.sum(-1, keepdim=True) + 1e-20",
        "weights.sum(-1, keepdim=True)",
        MODEL,
    ),
    Mutation(
        "then scaled",
        "dsv3/model/router.py",
        "return weights * self.config.route_scale",
        "return weights",
        MODEL,
    ),
    Mutation(
        "group score: sum of the top 2 with a bias",
        "dsv3/model/router.py",
        "best = 1 if self.selection_bias is None else 2",
        "best = 1",
        MODEL,
    ),
    Mutation(
        "group score: the maximum without",
        "dsv3/model/router.py",
        "best = 1 if self.selection_bias is None else 2",
        "best = 2",
        MODEL,
    ),
    Mutation(
        "closed groups masked with -inf",
        "dsv3/model/router.py",
        "closed.unsqueeze(-1), -torch.inf",
        "closed.unsqueeze(-1), 0.0",
        MODEL,
    ),
    Mutation(
        "bias moves against the load",
        "dsv3/training/expert_bias.py",
        "load[place].mean() - load[place]",
        "load[place] - load[place].mean()",
        TRAINING,
    ),
    Mutation(
        "load counted over all ranks",
        "dsv3/training/step.py",
        "take_load(self.routers, shape, self.worker.sum, self.worker.device)",
        "take_load(self.routers, shape, lambda x: x, self.worker.device)",
        SHARDED,
    ),
    Mutation(
        "load added up over microbatches",
        "dsv3/model/transformer.py",
        "block.ffn.router.load += stats.load",
        "block.ffn.router.load.copy_(stats.load)",
        TRAINING,
    ),
    Mutation(
        "load not counted again under recomputation",
        "dsv3/model/moe.py",
        "routing: Routing = self.router(x)",
        "routing: Routing = self.router(x); self.router.load.add_(routing.stats.load, alpha=0.5)",
        MODEL,
    ),
    Mutation(
        "bias update for MTP layers too",
        "dsv3/model/transformer.py",
        "return [module for module in self.modules() if isinstance(module, Router)]",
        "return [module for module in self.layers.modules() if isinstance(module, Router)]",
        f"{MODEL} {TRAINING}",
    ),
    Mutation(
        "balance loss counts raw scores",
        "dsv3/model/router.py",
        "raw = scores.detach().topk(top_k, dim=-1, sorted=False).indices",
        "raw = self.select(scores.detach())",
        MODEL,
    ),
    Mutation(
        "balance loss averages normalised scores",
        "dsv3/model/router.py",
        "(scores / (scores.sum(-1, keepdim=True) + 1e-20)).mean(dim=1)",
        "scores.mean(dim=1)",
        MODEL,
    ),
    Mutation(
        "balance loss per sequence",
        "dsv3/model/router.py",
        "return (frequency * share).sum(-1).mean()",
        "return (frequency.mean(0) * share.mean(0)).sum(-1)",
        MODEL,
    ),
    Mutation(
        "balance loss of MTP layers too",
        "dsv3/model/transformer.py",
        "            stats_of_layers += self._counted(module.block, stats)\n",
        "            self._counted(module.block, stats)\n",
        MODEL,
    ),
    Mutation(
        "MTP loss: mean over depths",
        "dsv3/training/loss.py",
        "whole.tokens / len(output.mtp_logits)",
        "whole.tokens",
        TRAINING,
    ),
    Mutation(
        "MTP loss: eq. 24's denominator",
        "dsv3/training/loss.py",
        "cross_entropy(logits, targets) / whole.tokens",
        "cross_entropy(logits, targets) / (targets >= 0).sum().clamp(min=1)",
        TRAINING,
    ),
    Mutation(
        "MTP joins [embedding, hidden]",
        "dsv3/model/transformer.py",
        "[self.embedding_norm(embedded), self.hidden_norm(hidden)]",
        "[self.hidden_norm(hidden), self.embedding_norm(embedded)]",
        MODEL,
    ),
    Mutation(
        "MTP receives the normed hidden state",
        "dsv3/model/transformer.py",
        "return self.norm(x), stats",
        "return x, stats",
        MODEL,
    ),
    Mutation(
        "MTP targets stay in their document",
        "dsv3/data/batch.py",
        "targets[:, depth:].masked_fill(~same, IGNORE)",
        "targets[:, depth:]",
        "tests/data",
    ),
    Mutation(
        "RMSNorm eps from the config", "dsv3/model/layers.py", "self.eps = eps", "self.eps = 1e-6", MODEL
    ),
    Mutation(
        "latent norms have their own eps",
        "dsv3/model/transformer.py",
        "scale, config.latent_norm_eps)",
        "scale, config.norm_eps)",
        MODEL,
    ),
    Mutation(
        "norms accumulate in fp32",
        "dsv3/model/layers.py",
        "F.rms_norm(x.float(), self.weight.shape, self.weight.float(), self.eps)",
        "F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)",
        MODEL,
    ),
    Mutation(
        "YaRN: mscale squared in the softmax",
        "dsv3/model/rope.py",
        "config.mscale_all_dim) ** 2",
        "config.mscale_all_dim)",
        HF,
    ),
    Mutation(
        "YaRN: cos and sin times the ratio of mscales",
        "dsv3/model/rope.py",
        "_mscale(config.factor, config.mscale) / _mscale(config.factor, config.mscale_all_dim)",
        "1.0",
        HF,
    ),
    Mutation(
        "YaRN: the ramp's bounds round outwards",
        "dsv3/model/rope.py",
        "math.ceil(_pair",
        "math.floor(_pair",
        f"tests/model/test_rope.py {HF}",
    ),
    Mutation(
        "RoPE pairs are adjacent",
        "dsv3/model/rope.py",
        "even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)",
        "even, odd = x.float().chunk(2, -1)",
        HF,
    ),
    Mutation(
        "RoPE tables and rotation in fp32",
        "dsv3/model/rope.py",
        "torch.stack([angles.cos(), angles.sin()], dim=-1)",
        "torch.stack([angles.cos(), angles.sin()], dim=-1).bfloat16()",
        HF,
    ),
    Mutation(
        "loss divided once by the global count",
        "dsv3/training/step.py",
        "local = torch.stack([valid_tokens(batch) for batch in microbatches]).sum()",
        "local = torch.stack([valid_tokens(batch) for batch in microbatches]).max() * len(microbatches)",
        TRAINING,
    ),
    Mutation(
        "gradients summed over ranks, not averaged",
        "dsv3/parallel/fsdp.py",
        "module.set_gradient_divide_factor(1.0)",
        "module.set_gradient_divide_factor(2.0)",
        SHARDED,
    ),
    Mutation(
        "one gradient norm over all shards",
        "dsv3/training/optimizer.py",
        "norm = worker.sum((torch.stack(norms).square() * shares).sum()).sqrt()",
        "norm = (torch.stack(norms).square() * shares).sum().sqrt()",
        SHARDED,
    ),
    Mutation(
        "block-fp8 scales are used",
        "dsv3/hf/storage_reader.py",
        "return dequantize(read, grid, self.block, origin, out.dtype, out)",
        "return out.copy_(read)",
        "tests/hf/test_storage_reader.py",
    ),
    Mutation(
        "and their blocks counted by global rows",
        "dsv3/hf/storage_reader.py",
        "return dequantize(read, grid, self.block, origin, out.dtype, out)",
        "return dequantize(read, grid, self.block, (0, 0), out.dtype, out)",
        "tests/hf/test_storage_reader.py",
    ),
    Mutation(
        "documents do not see each other",
        "dsv3/training/forward_backward.py",
        "output = self.model(batch.tokens, batch.documents if self.document_mask else None)",
        "output = self.model(batch.tokens, None)",
        TRAINING,
    ),
    Mutation(
        "logits in fp32",
        "dsv3/model/transformer.py",
        "logits, mtp_logits = self.head(x).float(), []",
        "logits, mtp_logits = self.head(x), []",
        MODEL,
    ),
    Mutation(
        "latent cache holds normed latents",
        "dsv3/model/attention.py",
        "return q_latent, self.kv_a_norm(latent), k_rope",
        "return q_latent, latent, k_rope",
        MODEL,
    ),
    Mutation(
        "gathered latents: every tensor rank's gradient counts",
        "dsv3/parallel/collectives.py",
        "return _scatter_sum(gradients[0], ctx.dim, ctx.group), None, None",
        "return gradients[0].chunk(ctx.group.size(), ctx.dim)[ctx.group.rank()], None, None",
        SHARDED,
    ),
    Mutation(
        "balance loss counts whole sequences where they are split",
        "dsv3/parallel/context_parallel.py",
        "return all_reduce(counts, self.group)",
        "return counts * self.shards",
        SHARDED,
    ),
    Mutation(
        "context parallel: keys in the row's order",
        "dsv3/parallel/context_parallel.py",
        "*chunks[1::2][::-1]",
        "*chunks[1::2]",
        SHARDED,
    ),
    Mutation(
        "pipeline: the embedding's two gradients are added",
        "dsv3/parallel/pipeline_parallel.py",
        "        self._add_up_embedding()\n",
        "",
        SHARDED,
    ),
    Mutation(
        "pipeline: balance loss reaches every stage",
        "dsv3/parallel/pipeline_parallel.py",
        "return gradients[0], torch.ones_like(ctx.saved_tensors[0])",
        "return gradients[0], torch.zeros_like(ctx.saved_tensors[0])",
        SHARDED,
    ),
    Mutation(
        "vocabulary parallel: the loss over all ranks' logits",
        "dsv3/parallel/tensor_parallel.py",
        "all_reduce(shifted.exp().sum(-1, keepdim=True), group).log()",
        "shifted.exp().sum(-1, keepdim=True).log()",
        SHARDED,
    ),
    Mutation(
        "expert parallel: a row takes its own experts' weights along",
        "dsv3/parallel/token_dispatch.py",
        "taken = weights[route.source, route.place].to(out.dtype)",
        "taken = weights[route.source].amax(-1).to(out.dtype)",
        SHARDED,
    ),
    Mutation(
        "DeepEP: rows are read once they have arrived",
        "dsv3/parallel/deepep.py",
        "        arrived.event.current_stream_wait()\n",
        "",
        "tests/parallel/test_deepep.py",
    ),
    Mutation(
        "DeepEP: the gradient of the weights comes back",
        "dsv3/parallel/deepep.py",
        "return x, summed, None, None",
        "return x, None, None, None",
        "tests/parallel/test_deepep.py",
    ),
    Mutation(
        "DeepEP: gradients of results go in FP8 where rows do",
        "dsv3/parallel/deepep.py",
        """dispatch(form.leave(gradients[0]), handle=ctx.handle)[0]
        return form.arrive(found), None, None""",
        """dispatch(gradients[0].contiguous(), handle=ctx.handle)[0]
        return found, None, None""",
        "tests/parallel/test_deepep.py",
    ),
    Mutation(
        "FP8: a tile never crosses an expert's rows",
        "dsv3/fp8/ops.py",
        "        blocks = _blocks(weight, scales, expert, recipe, rows.dtype)\n        out[own] = ENGINES[engine].multiply(operand, blocks, rows.dtype)",
        "        blocks = recipe.weight(weight.flatten(0, -2).to(rows.dtype))\n        out[own] = ENGINES[engine].multiply(operand, blocks, rows.dtype)[:, expert * out.shape[1] : (expert + 1) * out.shape[1]]",
        PRECISION,
    ),
    Mutation(
        "FP8: rows of another expert are in no tile along the tokens",
        "dsv3/fp8/ops.py",
        "recipe.along_tokens(gradient[own]), recipe.along_tokens(rows[own])",
        "recipe.along_tokens(gradient[own]), recipe.along_tokens(rows)._replace(codes=recipe.along_tokens(rows).codes[:, own])",
        PRECISION,
    ),
    Mutation(
        "FP8: scales after the sum of a block",
        "dsv3/fp8/matmul.py",
        "        torch.mm(left[:, depth], right[:, depth].t(), out=sums)\n",
        "        torch.mm(left[:, depth] * of_left[:, n, None], (right[:, depth] * of_right[:, n, None]).t(), out=sums)\n        out.add_(sums)\n        continue\n",
        PRECISION,
    ),
    Mutation(
        "FP8: the weight's gradient has tiles along the tokens",
        "dsv3/fp8/operands.py",
        "return self._quantize(x, (self.tile, 1)).turned()",
        "return self._quantize(x, (1, self.tile))._replace(block=(self.tile, 1)).turned()",
        PRECISION,
    ),
    Mutation(
        "FP8: the gradient of the rows takes the weight's grid turned",
        "dsv3/fp8/operands.py",
        "return Tiles(self.codes.t(), self.scales.t(), (self.block[1], self.block[0]))",
        "return Tiles(self.codes.t(), self.scales.reshape(self.scales.shape[::-1]), (self.block[1], self.block[0]))",
        PRECISION,
    ),
    Mutation(
        "FP8: the head keeps the compute dtype",
        "dsv3/fp8/convert_model.py",
        'IN_HIGHER_PRECISION = ("head",)',
        "IN_HIGHER_PRECISION = ()",
        PRECISION,
    ),
    Mutation(
        "FP8: what is not finite is counted",
        "dsv3/fp8/quantize.py",
        "    return by_block(nan, block).amax((1, 3)).sum()",
        "    return by_block(nan, block).amax((1, 3)).sum() * 0",
        PRECISION,
    ),
    Mutation(
        "FP8: a split backward pass computes each gradient once",
        "dsv3/fp8/ops.py",
        "        return torch._C._will_engine_execute_node(source)",
        "        return True",
        PRECISION,
    ),
    Mutation(
        "FP8: and counts what is not finite all the same",
        "dsv3/fp8/ops.py",
        "        leaf.grad = broken if leaf.grad is None else leaf.grad + broken\n",
        "        pass\n",
        PRECISION,
    ),
    Mutation(
        "FP8: the plan knows which weights are gathered so",
        "dsv3/planning/sharding.py",
        "return multiplies_in_fp8(weight) and shards > 1 and not odd and whole % BLOCK == 0",
        "return multiplies_in_fp8(weight) and shards > 1 and not odd",
        "tests/parallel/test_scale.py",
    ),
    Mutation(
        "FP8: FSDP's strided shards count where whole blocks are asked for",
        "dsv3/fp8/all_gather.py",
        'cut = [getattr(placement, "dim", None) for placement in weight.placements]',
        'cut = [getattr(p, "dim", None) if p.is_shard() else None for p in weight.placements]',
        "tests/parallel/test_fp8.py",
    ),
    Mutation(
        "FP8: a rank alone in its group gathers nothing",
        "dsv3/fp8/all_gather.py",
        " or _shards(weight) == 1",
        "",
        "tests/parallel/test_fp8.py",
    ),
    Mutation(
        "FP8: products take the codes that were gathered",
        "dsv3/fp8/operands.py",
        "return func(rows, weight.codes, weight.scales, *rest, **(kwargs or {}))",
        "return func(rows, weight.numbers(), None, *rest, **(kwargs or {}))",
        "tests/fp8/test_operands_block_weight.py",
    ),
    Mutation(
        "FP8: each expert's codes meet its own scales",
        "dsv3/fp8/ops.py",
        "    return Tiles(one, scales[own], (BLOCK, BLOCK))",
        "    return Tiles(one, scales[: one.shape[0] // BLOCK], (BLOCK, BLOCK))",
        "tests/fp8/test_operands_block_weight.py",
    ),
    Mutation(
        "FP8: rows that travel bring their scales",
        "dsv3/fp8/operands.py",
        "scales.view(torch.float32), dtype)",
        "torch.ones_like(scales.view(torch.float32)), dtype)",
        "tests/parallel/test_fp8.py",
    ),
    Mutation(
        "FP8: no hardware without block-wise scales",
        "dsv3/planning/checks.py",
        "    if fast and on not in HOPPER:",
        "    if False:",
        PRECISION,
    ),
    Mutation(
        "FP8: and does not make its tile's scale",
        "dsv3/fp8/quantize.py",
        "        largest = numbers.nan_to_num(nan=0.0).abs().amax((1, 3))",
        "        largest = numbers.nan_to_num(nan=LARGEST).abs().amax((1, 3))",
        PRECISION,
    ),
    Mutation(
        "FP8: scaled_mm reads a weight's scales by columns padded to four",
        "dsv3/fp8/matmul.py",
        "    return F.pad(scales, (0, -scales.shape[1] % _DEPTH_OF_SCALES), value=1.0).contiguous().t()",
        "    return scales.contiguous().t()",
        PRECISION,
    ),
]


def caught_by(mutation: Mutation, copy: Path) -> str | None:
    """The first test that fails with the mutation in place; None where all pass."""
    path = copy / mutation.file
    text = path.read_text()
    if text.count(mutation.old) != 1:
        raise SystemExit(f"{mutation.file} holds {mutation.old!r} {text.count(mutation.old)} times, not once")
    path.write_text(text.replace(mutation.old, mutation.new))
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
    """What earlier runs have found, by rule."""
    if not path.is_file():
        return {}
    return {entry["rule"]: entry["caught_by"] for entry in json.loads(path.read_text())}


def table(results: dict[str, str | None]) -> list[str]:
    """The lines of the table in docs/numerics.md."""
    rows = [f"| {rule} | {f'`{test}`' if test else '**nothing**'} |" for rule, test in results.items()]
    return ["| rule broken | caught by |", "|---|---|", *rows]


def main() -> int:
    """Try every mutation, print the table, write it into docs/numerics.md and JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument(
        "--only",
        default="",
        help="rules that hold this (regular expression); the others keep their last result",
    )
    parser.add_argument("--json", type=Path, default=RESULT)
    options = parser.parse_args()
    chosen = [mutation for mutation in MUTATIONS if re.search(options.only, mutation.rule, re.IGNORECASE)]
    known: list[Mutation] = []
    results = stored(options.json)
    with tempfile.TemporaryDirectory() as scratch:
        copy = Path(scratch) / "dsv3"
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".venv", ".git", "outputs"), symlinks=True)
        for mutation in chosen:
            results[mutation.rule] = caught_by(mutation, copy)
            print(f"{mutation.rule:<50} {results[mutation.rule] or 'NOT CAUGHT'}", flush=True)
            known = [mutation for mutation in MUTATIONS if mutation.rule in results]
            report = [asdict(mutation) | {"caught_by": results[mutation.rule]} for mutation in known]
            options.json.write_text(json.dumps(report, indent=1) + "\n")
    lines = table({mutation.rule: results[mutation.rule] for mutation in known})
    print("", *lines, sep="\n")
    if options.json == RESULT:
        fill("numerics.md", "mutations", lines)
    return 0 if all(results[mutation.rule] for mutation in chosen) else 1


if __name__ == "__main__":
    sys.exit(main())
