"""The small files beside the weights of an HF checkpoint: config, tokenizer, code, licence.

What came in with the weights leaves with them unchanged, through a DCP and through a run. Only config.json
follows the model that is written. A model that came with no tokenizer gets the files of the one trained here.
"""

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dsv3 import untrusted_files
from dsv3.checkpoint.directory import ASSETS_DIR, HF_DIR, MANIFEST_FILE, is_hf_checkpoint
from dsv3.checkpoint.training_record import TRAINING_FILE
from dsv3.config.model import ModelConfig
from dsv3.errors import UserError, quoted
from dsv3.hf.config_json import model_from_hf
from dsv3.hf.config_values import read_config
from dsv3.hf.config_writer import config_json, updated_config
from dsv3.hf.safetensors_reader import INDEX
from dsv3.tokens.tokenizer import BOS, FAST_CONFIG, Tokenizer
from dsv3.tokens.tokenizer_files import (
    READABLE,
    copy_tokenizer_files,
    has_tokenizer,
    has_vocabulary,
    is_tokenizer_file,
    read_object,
    tokenizer_files,
)
from dsv3.untrusted_files import BadFile, MissingFile, refuse_lfs_pointer

IMPORT_METADATA_FILE, SCALES_FILE = "dsv3.json", "scales.safetensors"
"""In hf/ of a DCP: the notes on how the weights were stored, and their fp8 scales."""

_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".distcp", ".msgpack", ".h5")

_OWN = (INDEX, IMPORT_METADATA_FILE, MANIFEST_FILE, TRAINING_FILE)
"""Files beside weights that describe these weights alone."""

_LARGEST = 256 * 2**20
"""Bytes of an asset at most; a larger file is taken for weights."""

GENERATION_FILE = "generation_config.json"


def hf_assets(directory: Path) -> Iterator[Path]:
    """Yield the files of an HF checkpoint that travel with its weights, at most 256 MiB each."""
    for path in sorted((*directory.iterdir(), *directory.glob("additional_chat_templates/*"))):
        plain = path.is_file() and not path.name.startswith(".") and path.name not in _OWN
        if plain and not path.name.endswith((*_WEIGHTS, ".index.json")) and path.stat().st_size <= _LARGEST:
            yield path


def copy_assets(source: Path, target: Path, tokenizer: bool = True) -> None:
    """Copy the assets of an HF checkpoint byte for byte, without `tokenizer` all but the tokenizer's files.

    Of a link the file that it leads to is copied. Code among the files is never run.
    """
    target.mkdir(parents=True, exist_ok=True)
    for path in hf_assets(source):
        name = path.relative_to(source)
        if tokenizer or not is_tokenizer_file(name.as_posix()):
            (target / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(path, target / name)


_OBJECTS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    GENERATION_FILE,
)
"""Assets that clients read as JSON objects: one that is damaged would make them fail."""


def require_assets(source: Path, tokenizer: bool = True) -> None:
    """Raise UserError for an asset that a clone without Git LFS left as a pointer, or that is damaged JSON.

    Without `tokenizer` the tokenizer's files stay behind and are not looked at. Of each asset 48 bytes are
    read, of those in _OBJECTS all.
    """
    for path in sorted({*hf_assets(source), *tokenizer_files(source)}):
        name = path.relative_to(source).as_posix()
        if tokenizer or not is_tokenizer_file(name):
            refuse_lfs_pointer(path)
            if name in _OBJECTS:
                read_object(path)


def asset_warnings(source: Path, model: ModelConfig, ids: bool = True) -> list[str]:
    """Return a line per flaw of assets that travel all the same: damaged JSON, ids that `model` lacks.

    Every .json file is read, one at a time. Without `ids` those that the files name are not written.
    """
    lines = []
    for path in hf_assets(source):
        if path.suffix == ".json" and path.name not in _OBJECTS:
            try:
                untrusted_files.read_json(path, "tokenizer")
            except BadFile as error:
                lines.append(f"{path} {error.reason}, and is copied as it is")
    if (source / "tokenizer_config.json").is_file() and not has_vocabulary(source):
        lines.append(
            f"{source} has a tokenizer_config.json and no vocabulary, so the output has no tokenizer: fetch "
            "the files beside it, convert.py direction=download assets=tokenizer"
        )
    for name in (GENERATION_FILE, "config.json") if ids else ():
        values = read_object(source / name)
        for key in _NO_TOKENS:
            told = values.get(key)
            for each in told if isinstance(told, list) else [told]:
                is_id = type(each) is int and 0 <= each < model.vocab_size
                if not is_id and each is not None and (key, each) != ("pad_token_id", -1):  # -1: no padding
                    lines.append(
                        f"{source / name}: {key}={quoted(told)}: the model has no id {quoted(each)}, it has "
                        f"0 to {model.vocab_size - 1:,}"
                    )
    return lines


def assets_folder(checkpoint: Path) -> Path | None:
    """Return the folder of the assets that a checkpoint of any kind carries, None where it carries none."""
    folder = checkpoint if is_hf_checkpoint(checkpoint) else checkpoint / HF_DIR
    return folder if (folder / "config.json").is_file() else None


def keep_assets(run_dir: Path, checkpoint: Path | None, tokenizer: bool) -> None:
    """Copy the assets of the checkpoint that a new run begins with into the run, for each of its steps.

    Without `tokenizer` the run has ids of its own: then the files of the other tokenizer stay behind. Assets
    that an attempt before has left are removed.
    """
    shutil.rmtree(run_dir / ASSETS_DIR, ignore_errors=True)
    source = None if checkpoint is None else assets_folder(checkpoint)
    if source is not None:
        require_assets(source, tokenizer)
        copy_assets(source, run_dir / ASSETS_DIR, tokenizer)


def copy_record(source: Path, target: Path) -> None:
    """Copy training.yaml beside the weights, where the weights of `source` were trained here."""
    if (source / TRAINING_FILE).is_file():
        shutil.copyfile(source / TRAINING_FILE, target / TRAINING_FILE)


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Store values in the layout of transformers."""
    path.write_text(json.dumps(values, indent=2) + "\n")


@dataclass(frozen=True)
class ExportAssets:
    """All that an export holds beside its weights, computed before these are written."""

    origin: Path | None
    """Folder of the assets that came in with the weights."""
    config: dict[str, Any]
    """The content of config.json."""
    tokenizer: Path | None = None
    """Folder of the run's own tokenizer, where none came in."""
    generation: dict[str, Any] = field(default_factory=dict)
    """The content of generation_config.json that goes with that tokenizer."""
    warnings: list[str] = field(default_factory=list)
    """Lines on flaws of what came in."""

    @classmethod
    def of(
        cls,
        model: ModelConfig,
        dtype: str,
        origin: Path | None,
        tokenizer: Path,
        quantization: dict[str, Any] | None = None,
    ) -> "ExportAssets":
        """Return the assets of weights in `dtype`, by config.json's name, or in the fp8 of `quantization`.

        `tokenizer` is the folder of the run's own, if it has one. UserError for a model that no class of
        transformers computes, and for files that cannot be read.
        """
        if origin is not None and (origin / "config.json").is_file():
            config = updated_config(read_config(origin).values, model, model_from_hf(origin))
            require_assets(origin)
        else:
            origin, config = None, config_json(model, dtype) | _NO_TOKENS
        config.pop("quantization_config", None)
        if quantization:
            config["quantization_config"] = quantization
        for key in {"dtype", "torch_dtype"} & config.keys() or {"torch_dtype"}:
            config[key] = dtype
        ids = {} if origin is not None and has_tokenizer(origin) else _token_ids(tokenizer)
        warnings = [] if origin is None else asset_warnings(origin, model, ids=not ids)
        if not ids:
            return cls(origin, config, warnings=warnings)
        stops = {} if origin is None else read_object(origin / GENERATION_FILE)
        return cls(origin, config | ids, tokenizer, stops | ids, warnings)

    def write(self, directory: Path) -> None:
        """Write the assets into the directory of the weights."""
        if self.origin is not None:
            copy_assets(self.origin, directory)
        stored = directory / "config.json"
        if not stored.is_file() or read_object(stored) != self.config:
            write_json(stored, self.config)
        if self.tokenizer is not None:
            copy_tokenizer_files(self.tokenizer, directory)
            write_json(directory / GENERATION_FILE, self.generation)
            file = directory / "tokenizer_config.json"
            named = read_object(file)
            # Older code wrote less beside a tokenizer that was trained here, or that came as a bare file.
            own = "tokenizer_class" not in named or named.get("bos_token") == BOS
            if own and FAST_CONFIG.keys() - named.keys():
                write_json(file, FAST_CONFIG | named)


_NO_TOKENS = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
"""A model without a tokenizer: transformers would take missing keys for the ids of DeepSeek's own."""


def _token_ids(folder: Path) -> dict[str, Any]:
    """Return the ids of a tokenizer's special tokens by config.json's keys, {} without a tokenizer."""
    if not any((folder / name).is_file() for name in READABLE):
        return {}
    tokenizer = Tokenizer.from_file(folder)
    ends = list(tokenizer.stop) if len(tokenizer.stop) > 1 else tokenizer.eos
    return {"bos_token_id": tokenizer.bos, "eos_token_id": ends, "pad_token_id": tokenizer.pad}


def read_import_metadata(directory: Path) -> dict[str, Any]:
    """Return the notes of an import on how the weights were stored; an empty dict where there are none."""
    path = directory / HF_DIR / IMPORT_METADATA_FILE
    try:
        found: Any = untrusted_files.read_json(path)
        if not isinstance(found, dict):
            raise ValueError("it is no JSON object")
        block, quantization = found.get("block", [1, 1]), found.get("quantization_config")
        sides = block if isinstance(block, list) else []
        if len(sides) != 2 or not all(type(side) is int and side > 0 for side in sides):
            raise ValueError(f"block={block!r} is not two sides")
        if not isinstance(quantization, dict | None):
            raise ValueError(f"quantization_config={quantization!r} is no object")
        import_metadata: dict[str, Any] = found
    except MissingFile:
        return {}
    except ValueError as error:
        reason = getattr(error, "reason", error)
        raise UserError(f"{path} cannot be read, it may be damaged: {reason}") from None
    return import_metadata
