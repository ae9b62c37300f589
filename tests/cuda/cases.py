"""The configurations that are simulated, by name: overrides of the tiny model's config, and the ranks."""

from typing import NamedTuple

from tests.harness.tiny import MODEL

ROWS, SEQUENCE, VOCAB = 2, 32, 96

BASE = [
    *MODEL,
    f"model.vocab_size={VOCAB}",
    "model.num_layers=3",
    "model.mtp_depths=1",
    "model.init_std=0.1",
    f"train.sequence_length={SEQUENCE}",
    "train.microbatch_size=1",
    f"train.global_batch_size={ROWS}",
    "logger=none",
]
"""Two MoE layers, a dense one, and one of multi-token prediction, which is a third MoE layer."""

DOCUMENTS = "data.document_mask=true"


class Case(NamedTuple):
    """One configuration."""

    overrides: list[str]
    ranks: int = 1


CASES = {
    "bf16": Case(["precision=bf16"]),
    "fp32": Case(["precision=fp32"]),
    "documents": Case(["precision=bf16", DOCUMENTS]),
    "documents sdpa": Case(["precision=bf16", DOCUMENTS, "model.attention.kernel=sdpa"]),
    "deterministic": Case(["precision=bf16", DOCUMENTS, "train.deterministic=true"]),
    "recompute full": Case(["precision=bf16", DOCUMENTS, "recompute=full"]),
    "recompute selective": Case(["precision=bf16", DOCUMENTS, "recompute=selective"]),
    "fp8": Case(["precision=fp8"]),
    "bf16 moments": Case(["precision=bf16", "precision.moments=bf16"]),
    "muon": Case(["precision=bf16", "optimizer=muon"]),
    "fsdp": Case(["precision=bf16", DOCUMENTS, "parallel=fsdp"], ranks=2),
    "hsdp": Case(["precision=bf16", "parallel=hsdp", "parallel.degrees.dp_replicate=2"], ranks=2),
    "ep": Case(["precision=bf16", "parallel=fsdp", "parallel.degrees.ep=2"], ranks=2),
    "ep fp8": Case(["precision=fp8", "precision.fp8.dispatch=true", "parallel=fsdp", "parallel.degrees.ep=2"], ranks=2),
    "tp": Case(["precision=bf16", "parallel=tp_ep", "parallel.degrees.tp=2"], ranks=2),
    "cp": Case(["precision=bf16", "parallel=cp", "parallel.degrees.cp=2"], ranks=2),
    "pp": Case(["precision=bf16", "parallel=pp", "parallel.degrees.pp=2"], ranks=2),
    "cp fp32": Case(["precision=fp32", "parallel=cp", "parallel.degrees.cp=2"], ranks=2),
    "tp fp32": Case(["precision=fp32", "parallel=tp_ep", "parallel.degrees.tp=2"], ranks=2),
    "cp documents": Case(["precision=bf16", DOCUMENTS, "parallel=cp", "parallel.degrees.cp=2"], ranks=2),
    "offload": Case(["precision=bf16", "parallel=fsdp", "parallel.fsdp.cpu_offload=true"], ranks=2),
}
