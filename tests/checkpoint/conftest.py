"""A small model with a past, a checkpoint of it, and train.py in this process."""

import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from dsv3.checkpoint.directory import Progress
from dsv3.checkpoint.manager import CheckpointManager
from dsv3.config.checkpoint import CheckpointConfig
from dsv3.config.model import AttentionConfig, ModelConfig, MoEConfig
from dsv3.config.strict import build
from dsv3.config.task import SamplingConfig
from dsv3.distributed.process_group import RankContext
from dsv3.model.transformer import Transformer
from tests.checkpoint.running import Commands

ALONE = RankContext(rank=0, local_rank=0, world=1, device=torch.device("cpu"))


class Trained:
    """A small model with its optimizer; `step` moves every parameter, bias and moment."""

    def __init__(self, seed: int, dim: int = 8, layers: int = 2, lr: float = 0.01) -> None:
        attention = AttentionConfig(2, 8, 8, 4, 4, 4)
        moe = MoEConfig(num_experts=4, top_k=2, num_shared_experts=1, hidden_dim=8)
        config = ModelConfig(16, dim, layers, 1, 16, attention, moe, mtp_depths=1)
        self.model: Transformer = build(config, compute_dtype=torch.float32)
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
        """The model's and the optimizer's tensors, as bytes."""
        tensors = dict(self.model.state_dict())
        for number, moments in self.optimizer.state_dict()["state"].items():
            tensors |= {f"{number}.{name}": value for name, value in moments.items()}
        return {name: t.reshape(-1).view(torch.uint8).numpy().tobytes() for name, t in tensors.items()}

    def save(self, run_dir: Path, **config: Any) -> Path:
        """Save with a manager of its own, and wait for it."""
        manager = CheckpointManager(run_dir, CheckpointConfig(**config), ALONE)
        saved = manager.save([self.model], self.optimizer, self.progress)
        manager.wait()
        return saved

    def restore(self, run_dir: Path) -> Progress | None:
        """Restore with a manager of its own."""
        return CheckpointManager(run_dir, CheckpointConfig(), ALONE).restore([self.model], self.optimizer)


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    """The small models are fastest, and the results the same everywhere, on one thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A run directory with a tokenizer in it."""
    tokenizer = tmp_path / "run" / "tokenizer"
    tokenizer.mkdir(parents=True)
    (tokenizer / "tokenizer.json").write_text("{}")
    return tmp_path / "run"


@pytest.fixture
def trained() -> Trained:
    return Trained(seed=0)


@pytest.fixture
def step(run_dir: Path, trained: Trained) -> Path:
    """A checkpoint of `trained`."""
    return trained.save(run_dir)


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 200 texts, most of them shorter than two rows: many a row holds several."""
    folder = tmp_path_factory.mktemp("text")
    choose = random.Random(0)
    words = [f"w{number}" for number in range(60)]
    for number in range(200):
        (folder / f"{number:03}.txt").write_text(" ".join(choose.choices(words, k=12)) + "\n")
    return folder


@pytest.fixture(scope="session")
def _cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def commands(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], text: Path, _cache: Path
) -> Commands:
    """train.py in this process."""
    monkeypatch.setenv("DSV3_CACHE", str(_cache))
    for variable in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(os.cpu_count()))  # a share of one thread: see _threads
    monkeypatch.setattr("sys.argv", ["train.py"])
    # Neither the picture nor the sample at the end of a run is looked at here.
    monkeypatch.setattr("dsv3.tasks.train.loss_curve", lambda *_: None)
    monkeypatch.setattr("dsv3.tasks.train.SAMPLING", SamplingConfig(max_tokens=1))
    return Commands(monkeypatch, capsys, text)
