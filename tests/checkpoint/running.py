"""Runs train.py in this process, on a model that trains in a blink."""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hydra
import pytest
import torch
from omegaconf import DictConfig

import train
from dsv3.checkpoint.dcp_metadata import load_tensors, read_metadata
from dsv3.checkpoint.directory import MANIFEST_FILE, complete_steps
from dsv3.checkpoint.manifest import FileEntry, write_manifest
from dsv3.config.root import CONF

VOLATILE = ("tokens_per_second", "mfu", "memory_gib")
MODEL = (
    "model.vocab_size=300",
    "model.dim=32",
    "model.num_layers=2",
    "model.dense_hidden_dim=48",
    "model.attention.heads=2",
    "model.attention.q_lora_rank=16",
    "model.attention.kv_lora_rank=16",
    "model.attention.qk_nope_head_dim=8",
    "model.attention.qk_rope_head_dim=4",
    "model.attention.v_head_dim=8",
    "model.moe.num_experts=4",
    "model.moe.top_k=2",
    "model.moe.hidden_dim=16",
    "model.moe.num_groups=1",
    "model.moe.top_k_groups=1",
)
TRAINING = (
    "tokenizer.vocab_size=300",
    "data.held_out=0.1",
    "train.sequence_length=32",
    "train.global_batch_size=4",
    "train.microbatch_size=4",
    "train.steps=8",
    "train.evaluate_every=3",
    "train.balance.bias_speed=0.01",
    "logger=none",
)


# Hydra finds the `conf` of train.main by the file of the program, which here is pytest.
@hydra.main(version_base=None, config_path=str(CONF), config_name="config")
def main(config: DictConfig) -> float | None:
    """What train.py does with a composed config."""
    return train.application.job(config)


@dataclass
class Outcome:
    """What a command gave back."""

    code: int
    out: str
    err: str


class Commands:
    """`python train.py ...` without the seconds that a new process takes to import torch."""

    def __init__(self, patch: pytest.MonkeyPatch, capture: pytest.CaptureFixture[str], text: Path) -> None:
        self.patch = patch
        self.capture = capture
        self.text = text

    def run(self, *arguments: str) -> Outcome:
        """Any command, with exactly these arguments."""
        self.patch.delenv("HYDRA_FULL_ERROR", raising=False)
        self.patch.setattr(train.application, "failure", None)
        self.capture.readouterr()
        try:
            code = train.application.run(main, list(arguments))
        finally:
            os.environ.pop("HYDRA_FULL_ERROR", None)
        said = self.capture.readouterr()
        return Outcome(code, said.out, said.err)

    def train(self, run_dir: Path, *arguments: str) -> Outcome:
        """Train the small model in `run_dir` on the small text; must succeed."""
        settings = [*MODEL, *TRAINING, "data=text", f"data.path={self.text}"]
        merged = {argument.split("=")[0]: argument for argument in [*settings, *arguments]}
        return self.must(*merged.values(), f"run.dir={run_dir}")

    def must(self, *arguments: str) -> Outcome:
        """A command that has to end with 0."""
        outcome = self.run(*arguments)
        assert outcome.code == 0, outcome.err
        return outcome


def rows(run_dir: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl as they stand there, less what differs between two equal runs."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in VOLATILE} for line in lines]


def tensors(step: Path) -> dict[str, bytes]:
    """Every tensor of a checkpoint as bytes."""
    entries: dict[str, Any] = dict(read_metadata(step).state_dict_metadata)
    loaded = {name: torch.empty(entry.size, dtype=entry.properties.dtype) for name, entry in entries.items()}
    load_tensors(step, loaded)
    return {name: tensor.reshape(-1).view(torch.uint8).numpy().tobytes() for name, tensor in loaded.items()}


def last_tensors(run_dir: Path) -> dict[str, bytes]:
    """Every tensor of a run's last checkpoint."""
    return tensors(complete_steps(run_dir)[-1])


def seal(step: Path) -> None:
    """Make the manifest fit what was put into a checkpoint: who writes one file can write that one too."""
    files = (path for path in step.rglob("*") if path.is_file() and path.name != MANIFEST_FILE)
    write_manifest(step, {str(path.relative_to(step)): FileEntry.of(path) for path in files})


def unseal(step: Path) -> None:
    """Make a checkpoint one of the time before manifests."""
    (step / MANIFEST_FILE).unlink()
    stored = json.loads((step / "state.json").read_text())
    del stored["manifest"], stored["evaluation_loss"]
    (step / "state.json").write_text(json.dumps(stored))
