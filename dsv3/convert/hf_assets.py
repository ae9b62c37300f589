"""The small files that travel with weights: config, tokenizer, generation defaults, code, licence."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dsv3.checkpoint.directory import MANIFEST_FILE
from dsv3.errors import UserError
from dsv3.hf.safetensors_reader import INDEX

HF_DIR, IMPORT_METADATA_FILE, SCALES_FILE = "hf", "dsv3.json", "scales.safetensors"
"""Where a DCP keeps what came with its weights: the files, notes on how they were stored, their scales."""

_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".distcp", ".msgpack", ".h5")

_LARGEST = 256 * 2**20


def hf_assets(directory: Path) -> Iterator[Path]:
    """The files of a released checkpoint that are neither weights nor an index of them."""
    for path in sorted(directory.iterdir()):
        plain = path.is_file() and not path.name.startswith(".")
        if plain and not path.name.endswith((*_WEIGHTS, ".index.json")) and path.stat().st_size <= _LARGEST:
            yield path


def copy_assets(source: Path, target: Path) -> None:
    """Copy the companions of weights, links as what they lead to."""
    target.mkdir(parents=True, exist_ok=True)
    for path in hf_assets(source):
        if path.name not in (INDEX, IMPORT_METADATA_FILE, MANIFEST_FILE):
            shutil.copyfile(path, target / path.name)


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Store values as transformers does."""
    path.write_text(json.dumps(values, indent=2) + "\n")


def read_import_metadata(directory: Path) -> dict[str, Any]:
    """What an import has noted of the weights' style; nothing where there are no notes."""
    path = directory / HF_DIR / IMPORT_METADATA_FILE
    try:
        import_metadata: dict[str, Any] = json.loads(path.read_text())
        _check_import_metadata(import_metadata)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read, it may be damaged: {error}") from None
    return import_metadata


def _check_import_metadata(import_metadata: Any) -> None:
    """ValueError for notes that an import would not have written."""
    if not isinstance(import_metadata, dict):
        raise ValueError("it is no JSON object")
    block, quantization = import_metadata.get("block", [1, 1]), import_metadata.get("quantization_config")
    sides = block if isinstance(block, list) else []
    if len(sides) != 2 or not all(type(side) is int and side > 0 for side in sides):
        raise ValueError(f"block={block!r} is not two sides")
    if not isinstance(quantization, dict | None):
        raise ValueError(f"quantization_config={quantization!r} is no object")
