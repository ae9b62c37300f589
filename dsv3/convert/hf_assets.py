"""The small files that travel with weights: config, tokenizer, generation defaults, code, licence."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dsv3.checkpoint.directory import MANIFEST_FILE
from dsv3.errors import UserError
from dsv3.hf.safetensors_reader import INDEX

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
        if path.name not in (INDEX, NOTES, MANIFEST_FILE):
            shutil.copyfile(path, target / path.name)


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Store values as transformers does."""
    path.write_text(json.dumps(values, indent=2) + "\n")


def read_notes(directory: Path) -> dict[str, Any]:
    """What an import has noted of the weights' style; nothing where there are no notes."""
    path = directory / HF_DIR / NOTES
    try:
        notes: dict[str, Any] = json.loads(path.read_text())
        _check_notes(notes)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read, it may be damaged: {error}") from None
    return notes


def _check_notes(notes: Any) -> None:
    """ValueError for notes that an import would not have written."""
    if not isinstance(notes, dict):
        raise ValueError("it is no JSON object")
    block, quantization = notes.get("block", [1, 1]), notes.get("quantization_config")
    sides = block if isinstance(block, list) else []
    if len(sides) != 2 or not all(type(side) is int and side > 0 for side in sides):
        raise ValueError(f"block={block!r} is not two sides")
    if not isinstance(quantization, dict | None):
        raise ValueError(f"quantization_config={quantization!r} is no object")
