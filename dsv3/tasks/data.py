"""Data for a task: prepared once by rank 0, then found in the cache by the others."""

from pathlib import Path

from dsv3.checkpoint.directory import TOKENIZER_DIR
from dsv3.config import Config, build
from dsv3.data.sources import PreparedData
from dsv3.data.tokenizer import Tokenizer
from dsv3.runtime.distributed import Worker


def prepare_data(
    config: Config, worker: Worker, tokenizer: Tokenizer | None = None, evaluate: bool = False
) -> PreparedData:
    """The configured data and tokenizer (or the one given), checked against the model's vocabulary."""
    source = build(config.data)
    chosen = tokenizer or build(config.tokenizer)

    def prepare() -> PreparedData:
        data: PreparedData = source.prepare(chosen, config.train.length, config.train.seed, evaluate)
        return data

    # One process does the work and the rest find it done. A failure of rank 0 ends the others too.
    data = prepare() if worker.local_rank == 0 else None
    worker.barrier()
    data = data or prepare()
    data.check_vocabulary(config.model.vocab_size)
    return data


def stored_tokenizer(config: Config, checkpoint: Path, overrides: list[str]) -> Tokenizer | None:
    """The tokenizer that lies with a checkpoint, unless the user chose another."""
    chosen = any(o.lstrip("+").startswith("tokenizer") for o in overrides)
    folder = checkpoint / TOKENIZER_DIR
    if (checkpoint / "tokenizer.json").is_file():
        folder = checkpoint  # a HuggingFace checkpoint
    return Tokenizer.from_file(folder) if folder.is_dir() and not chosen else None
