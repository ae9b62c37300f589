"""The small files that travel with weights: config, tokenizer, generation defaults, code, licence."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dsv3.checkpoint.shards import INDEX
from dsv3.runtime.errors import UserError

HF_DIR, NOTES, SCALES_FILE = "hf", "dsv3.json", "scales.safetensors"
"""Where a DCP keeps what came with its weights: the files, notes on how they were stored, their scales."""
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".distcp", ".msgpack", ".h5")
_LARGEST = 256 * 2**20


def companions(directory: Path) -> Iterator[Path]:
    """The files of a released checkpoint that are neither weights nor an index of them."""
    for path in sorted(directory.iterdir()):
        plain = path.is_file() and not path.name.startswith(".")
        if plain and not path.name.endswith((*_WEIGHTS, ".index.json")) and path.stat().st_size <= _LARGEST:
            yield path


def carry(source: Path, target: Path) -> None:
    """Copy the companions of weights, links as what they lead to."""
    target.mkdir(parents=True, exist_ok=True)
    for path in companions(source):
        if path.name not in (INDEX, NOTES):
            shutil.copyfile(path, target / path.name)


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Store values as transformers does."""
    path.write_text(json.dumps(values, indent=2) + "\n")


def read_notes(directory: Path) -> dict[str, Any]:
    """What an import has noted of the weights' style; nothing where there are no notes."""
    path = directory / HF_DIR / NOTES
    try:
        notes: dict[str, Any] = json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    return notes
