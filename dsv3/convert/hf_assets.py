"""The small files beside the weights of an HF checkpoint: config, tokenizer, code, licence."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dsv3.checkpoint.directory import HF_DIR, MANIFEST_FILE
from dsv3.checkpoint.training_record import TRAINING_FILE
from dsv3.errors import UserError
from dsv3.hf.safetensors_reader import INDEX

IMPORT_METADATA_FILE, SCALES_FILE = "dsv3.json", "scales.safetensors"
"""In hf/ of a DCP: the notes on how the weights were stored, and their fp8 scales."""

_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".distcp", ".msgpack", ".h5")

_LARGEST = 256 * 2**20

_TOKENIZER_CONFIG = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}


def hf_assets(directory: Path) -> Iterator[Path]:
    """Yield the files of an HF checkpoint that are neither weights nor an index of them."""
    for path in sorted(directory.iterdir()):
        plain = path.is_file() and not path.name.startswith(".")
        if plain and not path.name.endswith((*_WEIGHTS, ".index.json")) and path.stat().st_size <= _LARGEST:
            yield path


def copy_assets(source: Path, target: Path) -> None:
    """Copy the assets of an HF checkpoint; of a link, the file that it leads to."""
    target.mkdir(parents=True, exist_ok=True)
    for path in hf_assets(source):
        if path.name not in (INDEX, IMPORT_METADATA_FILE, MANIFEST_FILE, TRAINING_FILE):
            shutil.copyfile(path, target / path.name)


def copy_record(source: Path, target: Path) -> None:
    """Copy training.yaml beside the weights, where the weights of `source` were trained here."""
    if (source / TRAINING_FILE).is_file():
        shutil.copyfile(source / TRAINING_FILE, target / TRAINING_FILE)


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Store values in the layout of transformers."""
    path.write_text(json.dumps(values, indent=2) + "\n")


def copy_tokenizer(stored: Path, directory: Path) -> None:
    """Copy a tokenizer trained here, if there is one, to the name under which transformers looks for it."""
    file = stored / "tokenizer.json"
    if file.is_file() and not (directory / file.name).exists():
        shutil.copyfile(file, directory / file.name)
        beside = stored / "tokenizer_config.json"  # names bos and eos, without which ids would differ
        named = json.loads(beside.read_text("utf-8")) if beside.is_file() else {}
        named.pop("auto_map", None)  # code that is not copied
        write_json(directory / "tokenizer_config.json", named | _TOKENIZER_CONFIG)


def read_import_metadata(directory: Path) -> dict[str, Any]:
    """Return the notes of an import on how the weights were stored; an empty dict where there are none."""
    path = directory / HF_DIR / IMPORT_METADATA_FILE
    try:
        found: Any = json.loads(path.read_text())
        if not isinstance(found, dict):
            raise ValueError("it is no JSON object")
        block, quantization = found.get("block", [1, 1]), found.get("quantization_config")
        sides = block if isinstance(block, list) else []
        if len(sides) != 2 or not all(type(side) is int and side > 0 for side in sides):
            raise ValueError(f"block={block!r} is not two sides")
        if not isinstance(quantization, dict | None):
            raise ValueError(f"quantization_config={quantization!r} is no object")
        import_metadata: dict[str, Any] = found
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read, it may be damaged: {error}") from None
    return import_metadata
