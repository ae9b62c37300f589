"""Speed of a training step against HF transformers, on the same model, tokens and optimizer.

Both build the "bench" shape (33,014,016 parameters) with the same weights, and take turns: a round is a
few steps of each variant (forward, backward, clip, fused AdamW on 2 x 512 tokens), so that whatever else
the machine does meets all of them. The ratio is the median over rounds. Ours is the real training step,
balance loss and load counters included; HF's gets the same next-token loss. HF runs with each way it has
to compute experts, and in bf16 both as bf16 weights and as fp32 weights under autocast (which is what
ours does); the best of them is the peer. Peak memory is that of a process of its own for each variant.

    python benchmarks/train_step.py
    python benchmarks/train_step.py --rounds 3 --precision bf16
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from hydra import compose, initialize_config_dir
from torch import Tensor, nn

from dsv3.config.model import ModelConfig
from dsv3.config.registry import CONF, register
from dsv3.config.root import Config
from dsv3.config.strict import strict
from dsv3.data.batch import collate
from dsv3.data.packing import PackedRow
from dsv3.distributed.process_group import RankContext
from dsv3.parallel.parallelize import build_model
from dsv3.planning.parameters import training_flops_per_token
from dsv3.training.optimizer import build_optimizer
from dsv3.training.schedule import StepHyperparameters
from dsv3.training.step import LocalForwardBackward, TrainStep

RESULT = Path(__file__).resolve().parent / "results" / "train_step.json"
BATCH, SEQUENCE, LR = 2, 512, 1e-4
BENCH = [
    "model.vocab_size=2048",
    "model.dim=256",
    "model.num_layers=6",
    "model.num_dense_layers=1",
    "model.dense_hidden_dim=1024",
    "model.mtp_depths=0",
    "model.attention.heads=16",
    "model.attention.q_lora_rank=null",
    "model.attention.kv_lora_rank=512",
    "model.attention.qk_nope_head_dim=128",
    "model.attention.qk_rope_head_dim=64",
    "model.attention.v_head_dim=128",
    "model.moe.num_experts=8",
    "model.moe.top_k=3",
    "model.moe.num_shared_experts=2",
    "model.moe.hidden_dim=256",
    "model.moe.num_groups=1",
    "model.moe.top_k_groups=1",
]
PEERS = {
    "fp32": {"hf eager": ("eager", "fp32"), "hf grouped_mm": ("grouped_mm", "fp32")},
    "bf16": {
        "hf eager, bf16 weights": ("eager", "bf16"),
        "hf grouped_mm, bf16 weights": ("grouped_mm", "bf16"),
        "hf eager, autocast": ("eager", "autocast"),
        "hf grouped_mm, autocast": ("grouped_mm", "autocast"),
    },
}
OURS = "dsv3"
Step = Callable[[], None]


def bench_config(precision: str) -> Config:
    """The bench shape as a config of ours."""
    register()
    with initialize_config_dir(str(CONF), version_base=None):
        composed = compose("config", [*BENCH, f"precision={precision}", "recompute=none"])
    config: Config = strict(composed)
    return config


def our_step(precision: str, tokens: Tensor) -> Step:
    """One training step of ours, as train.py takes it."""
    config = bench_config(precision)
    model = build_model(config, None, torch.device("cpu"))
    optimizer = build_optimizer(config.optimizer, [model])
    step = TrainStep(
        LocalForwardBackward(model, False), optimizer, RankContext(0, 0, 1, torch.device("cpu")), 1.0
    )
    documents = torch.zeros(SEQUENCE + 1, dtype=torch.int32).numpy()
    batch = collate([PackedRow(row.numpy(), documents) for row in tokens])
    weights = StepHyperparameters(lr=LR, mtp_weight=0.0, balance_weight=1e-4, bias_speed=1e-3)

    def take() -> None:
        step([batch], weights).loss.item()

    return take


def peer_step(experts: str, precision: str, tokens: Tensor) -> Step:
    """The same step of HF's model of the same shape."""
    model = peer_model(bench_config("fp32").model, experts)
    if precision == "bf16":
        model = model.to(torch.bfloat16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    autocast = torch.autocast("cpu", torch.bfloat16) if precision == "autocast" else nullcontext()

    def step() -> None:
        with autocast:
            logits = model(tokens[:, :-1]).logits
        loss = F.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss.item()

    return step


def peer_model(config: ModelConfig, experts: str, sequence: int = SEQUENCE) -> nn.Module:
    """HF's DeepseekV3ForCausalLM with our numbers, by its fastest attention (sdpa)."""
    import transformers

    a, m = config.attention, config.moe
    hf = transformers.DeepseekV3Config(
        vocab_size=config.vocab_size, hidden_size=config.dim, intermediate_size=config.dense_hidden_dim,
        moe_intermediate_size=m.hidden_dim, num_hidden_layers=config.num_layers,
        first_k_dense_replace=config.num_dense_layers, num_attention_heads=a.heads,
        num_key_value_heads=a.heads, q_lora_rank=a.q_lora_rank, kv_lora_rank=a.kv_lora_rank,
        qk_nope_head_dim=a.qk_nope_head_dim, qk_rope_head_dim=a.qk_rope_head_dim,
        v_head_dim=a.v_head_dim, n_routed_experts=m.num_experts, num_experts_per_tok=m.top_k,
        n_shared_experts=m.num_shared_experts, n_group=1, topk_group=1, norm_topk_prob=True,
        routed_scaling_factor=m.route_scale, max_position_embeddings=sequence, use_cache=False,
    )  # fmt: skip
    hf._experts_implementation = experts
    hf._attn_implementation = "sdpa"
    torch.manual_seed(0)
    model: nn.Module = transformers.DeepseekV3ForCausalLM(hf)
    return model.train()


def variants(precision: str, tokens: Tensor) -> dict[str, Callable[[], Step]]:
    """What is compared in one precision, by name."""
    found: dict[str, Callable[[], Step]] = {OURS: lambda: our_step(precision, tokens)}
    for name, (experts, how) in PEERS[precision].items():
        found[name] = lambda experts=experts, how=how: peer_step(experts, how, tokens)  # type: ignore[misc]
    return found


def matmul_flops(dtype: torch.dtype, size: int = 2048) -> float:
    """FLOP/s of one large square matmul."""
    a, b = torch.randn(size, size).to(dtype), torch.randn(size, size).to(dtype)
    a @ b
    started = time.perf_counter()
    a @ b
    return 2 * size**3 / (time.perf_counter() - started)


def measure(precision: str, rounds: int, steps: int) -> dict[str, Any]:
    """Tokens/s of every variant in every round, and the roofline measured between them."""
    tokens = _tokens()
    running = {name: make() for name, make in variants(precision, tokens).items()}
    for step in running.values():
        step()
    rates: dict[str, list[float]] = {name: [] for name in running}
    roofline = []
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    for _ in range(rounds):
        roofline.append(matmul_flops(dtype))
        for name, step in running.items():
            started = time.perf_counter()
            for _ in range(steps):
                step()
            rates[name].append(steps * BATCH * SEQUENCE / (time.perf_counter() - started))
    return _summary(precision, rates, roofline)


def _summary(precision: str, rates: dict[str, list[float]], roofline: list[float]) -> dict[str, Any]:
    peer = max((name for name in rates if name != OURS), key=lambda name: median(rates[name]))
    flops = training_flops_per_token(bench_config("fp32").model, SEQUENCE)
    bound = median(roofline) / flops
    return {
        "precision": precision,
        "tokens_per_second": {name: median(values) for name, values in rates.items()},
        "peer": peer,
        "ratio": median(ours / theirs for ours, theirs in zip(rates[OURS], rates[peer], strict=True)),
        "matmul_gflops": median(roofline) / 1e9,
        "roofline_tokens_per_second": bound,
        "share_of_roofline": median(rates[OURS]) / bound,
        "peak_memory_gib": {name: _memory_of(precision, name) for name in rates},
        "rounds": rates,
    }


def _memory_of(precision: str, name: str) -> float:
    """Peak memory of two steps in a process of its own, less what the imports took, GiB."""
    command = [sys.executable, __file__, "--memory-of", name, "--precision", precision]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def _print_memory(precision: str, name: str) -> None:
    import transformers  # noqa: F401  # every variant has it in memory

    before = _peak_kib()
    step = variants(precision, _tokens())[name]()
    step()
    step()
    print((_peak_kib() - before) / 2**20)


def _peak_kib() -> int:
    """This program's peak memory; getrusage would count the parent's as well."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in line]
    return int(line.split()[1])


def _tokens() -> Tensor:
    return torch.randint(0, 2048, (BATCH, SEQUENCE + 1), generator=torch.Generator().manual_seed(0))


def _show(found: dict[str, Any]) -> None:
    print(f"\n{found['precision']}: matmul {found['matmul_gflops']:.0f} GFLOP/s, "
          f"roofline {found['roofline_tokens_per_second']:.0f} tokens/s")  # fmt: skip
    for name, rate in found["tokens_per_second"].items():
        memory = found["peak_memory_gib"][name]
        share = rate / found["roofline_tokens_per_second"]
        print(f"  {name:<28} {rate:7.0f} tokens/s  {share:5.0%} of the roofline  {memory:5.2f} GiB")
    print(f"  {OURS} / {found['peer']}: {found['ratio']:.2f}")


def main() -> None:
    """Measure, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--precision", choices=list(PEERS), nargs="+", default=list(PEERS))
    parser.add_argument("--json", type=Path, default=RESULT)
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.memory_of:
        _print_memory(options.precision[0], options.memory_of)
        return
    import transformers

    results = [measure(precision, options.rounds, options.steps) for precision in options.precision]
    for found in results:
        _show(found)
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    report = {**versions, "cores": torch.get_num_threads(), "results": results}
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
