"""The configurations that are simulated, and what is expected of a training step of each.

host_waits.json says where the host may wait for the GPU in it: {case: {"file function: kind": waits}}. The
numbers are those of one step of the tiny model on rank 0. It has two MoE layers, one of which predicts a
further token. A step has two microbatches where one rank, or all ranks together, take all rows; one where
the ranks share them out. The table of docs/gpu.md says the same of a step at any size.
"""

import json
from pathlib import Path
from typing import NamedTuple

from tests.harness.tiny import MODEL

ROWS, SEQUENCE, VOCAB = 2, 32, 96

BASE = [
    *MODEL,
    f"model.vocab_size={VOCAB}",
    "model.num_layers=2",
    "model.mtp_depths=1",
    "model.init_std=0.1",
    f"train.sequence_length={SEQUENCE}",
    "train.microbatch_size=1",
    f"train.global_batch_size={ROWS}",
    "logger=none",
]

EXACT, BF16_FLIPS = 1e-6, 4e-3
"""Largest relative differences of a loss. Where something rounds elsewhere in bf16, a token may go to
another expert;
such a loss proves little more than the plumbing, and the fp32 cases prove the rest."""


class Case(NamedTuple):
    """One configuration and what is expected of it."""

    overrides: list[str]
    ranks: int = 1
    reference: str | None = None
    """The simulated case that has the same losses; None computes them on the CPU."""
    tolerance: float = BF16_FLIPS
    kernels: tuple[str, ...] = ("cudnn 16/8",)
    """Attention kernels that PyTorch must choose, with the widths of the heads of queries and values."""


BF16, DOCUMENTS, VARLEN = "precision=bf16", "data.document_mask=true", ("varlen 16/16",)
IN_FP8 = ["precision=fp8", "model.moe.num_experts=4", "model.moe.num_groups=1", "model.moe.top_k_groups=1"]
"""Few experts: each is quantized and multiplied by calls of its own."""
EP = ["parallel=fsdp", "parallel.degrees.ep=2"]
OFFLOAD = ["parallel=fsdp", "parallel.fsdp.cpu_offload=true"]

CASES = {
    "fp32": Case(["precision=fp32"], 1, None, EXACT, ("efficient 16/8",)),
    "bf16": Case([BF16]),
    "documents": Case([BF16, DOCUMENTS], kernels=VARLEN),
    "documents, sdpa": Case(
        [BF16, DOCUMENTS, "model.attention.kernel=sdpa"], 1, "documents", EXACT, ("flash 16/16",)
    ),
    "deterministic": Case([BF16, DOCUMENTS, "train.deterministic=true"], 1, "documents", EXACT, VARLEN),
    "recompute=full": Case([BF16, DOCUMENTS, "recompute=full"], 1, "documents", EXACT, VARLEN),
    "recompute=selective": Case([BF16, DOCUMENTS, "recompute=selective"], 1, "documents", EXACT, VARLEN),
    "bf16 moments": Case([BF16, "precision.moments=bf16"], 1, "bf16", EXACT),
    "muon": Case([BF16, "optimizer=muon"]),
    "fp8": Case(IN_FP8),
    "fp8, emulated": Case([*IN_FP8, "precision.fp8.engine=emulated"], 1, "fp8"),
    "fsdp": Case([BF16, DOCUMENTS, "parallel=fsdp"], 2, "documents", kernels=VARLEN),
    "hsdp": Case([BF16, "parallel=hsdp"], 2, "bf16"),
    "ep": Case([BF16, *EP], 2, "bf16"),
    "ep, fp8": Case([*IN_FP8, "precision.fp8.dispatch=true", *EP], 2, "fp8"),
    "tp": Case([BF16, "parallel=tp_ep"], 2, "bf16"),
    "cp": Case([BF16, "parallel=cp"], 2, "bf16"),
    "cp, documents": Case([BF16, DOCUMENTS, "parallel=cp"], 2, "documents", kernels=VARLEN),
    "cp, fp32": Case(
        ["precision=fp32", "parallel=cp"], 2, "fp32", EXACT, ("efficient 16/8", "efficient lower-right 16/8")
    ),
    "pp": Case([BF16, DOCUMENTS, "parallel=pp"], 2, "documents", kernels=VARLEN),
    "cpu_offload": Case([BF16, *OFFLOAD], 2, "bf16"),
}

HOST_WAITS: dict[str, dict[str, int]] = json.loads(Path(__file__).with_name("host_waits.json").read_text())
