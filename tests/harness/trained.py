"""The tiny model with a past: an optimizer with moments, and steps that cost nothing."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from dsv3.checkpoint.directory import Progress
from dsv3.checkpoint.manager import CheckpointManager
from dsv3.config.checkpoint import CheckpointConfig
from dsv3.config.strict import build
from dsv3.distributed.process_group import RankContext
from dsv3.model.transformer import Transformer
from dsv3.training.step import TrainStep
from tests.harness.checkpoints import as_bytes
from tests.harness.tiny import model_config

ALONE = RankContext(rank=0, local_rank=0, world=1, device=torch.device("cpu"))
"""The only rank of a world of one."""


@contextmanager
def killed_in_step(monkeypatch: pytest.MonkeyPatch, number: int) -> Iterator[None]:
    """Let the run inside be broken off in its step `number`, counted from 1, as it fails a TrainCommand."""
    step, calls = TrainStep.__call__, []

    def kill(*arguments: object) -> object:
        calls.append(1)
        if len(calls) == number:
            raise KeyboardInterrupt
        return step(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(TrainStep, "__call__", kill)
    with pytest.raises(AssertionError):
        yield
    monkeypatch.setattr(TrainStep, "__call__", step)


class Trained:
    """The tiny model with its optimizer; `step` moves every parameter, bias and moment."""

    def __init__(self, seed: int, lr: float = 0.01, **changes: Any) -> None:
        self.model: Transformer = build(replace(model_config(), **changes), compute_dtype=torch.float32)
        self.random = torch.Generator().manual_seed(seed)
        for parameter in self.model.parameters():
            torch.nn.init.normal_(parameter, generator=self.random)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=lr)
        self.progress = Progress()
        self.step()

    @torch.no_grad()
    def step(self) -> Progress:
        """Move everything, by random amounts."""
        for parameter in self.model.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=self.random)
            parameter.add_(torch.randn(parameter.shape, generator=self.random), alpha=0.1)
        for buffer in self.model.buffers():
            buffer.copy_(torch.randn(buffer.shape, generator=self.random))
        self.optimizer.step()
        self.optimizer.zero_grad()
        count = self.progress.step + 1
        self.progress = Progress(step=count, samples=count * 4, tokens=count * 32)
        return self.progress

    def state(self) -> dict[str, bytes]:
        """Return the model's and the optimizer's tensors, as bytes."""
        tensors = dict(self.model.state_dict())
        for number, moments in self.optimizer.state_dict()["state"].items():
            tensors |= {f"{number}.{name}": value for name, value in moments.items()}
        return {name: as_bytes(tensor) for name, tensor in tensors.items()}

    def save(self, run_dir: Path, **config: Any) -> Path:
        """Save with a manager of its own, and wait for it."""
        manager = CheckpointManager(run_dir, CheckpointConfig(**config), ALONE)
        saved = manager.save([self.model], self.optimizer, self.progress)
        manager.wait()
        return saved

    def restore(self, run_dir: Path) -> Progress | None:
        """Restore with a manager of its own."""
        return CheckpointManager(run_dir, CheckpointConfig(), ALONE).restore([self.model], self.optimizer)
