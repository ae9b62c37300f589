"""training.yaml: what a checkpoint was trained on, and with which config, beside its weights.

Every step of a run, every HuggingFace export of a live model and every conversion of one has it. It is data:
nothing is built from it.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import yaml

from dsv3.checkpoint.directory import find_checkpoint, write_text
from dsv3.checkpoint.manifest import TENSOR_FILES, read_manifest
from dsv3.config.convergence import HASH_LENGTH, convergence_hash
from dsv3.config.data import ROW_ORDER
from dsv3.config.strict import to_absolute_yaml
from dsv3.config.upgrade import upgrade_node
from dsv3.errors import UserError
from dsv3.untrusted_files import MissingFile, open_file, read_yaml

TRAINING_FILE = "training.yaml"

# Of a file of weights that no manifest describes, so many blocks of so many bytes tell it from others.
_BLOCKS, _BLOCK_BYTES = 16, 64 * 1024


@dataclass
class TrainingRecord:
    """The content of training.yaml."""

    convergence: str
    """Hash of all that decides what is learnt (config/convergence.py)."""
    data_fingerprint: str | None
    tokenizer_fingerprint: str | None
    """None for data that is token ids already."""
    step: int
    """Optimizer steps done."""
    config: dict[str, Any]
    """The whole resolved config of the run, with absolute paths."""
    weights: str | None = None
    """Identity of the weights that the run began with; None for initial weights."""
    history: list[dict[str, Any]] = field(default_factory=list)
    """A {step, convergence} for every stretch that a resume with other learnt values ended."""
    row_order: int = 1
    """ROW_ORDER of the code that trained (config/data.py); older code has not told it."""
    data_changes: list[dict[str, Any]] = field(default_factory=list)
    """A {step, from, to, what, effect} for every change of the data that a resume was told to allow.

    `from` and `to` are fingerprints."""

    @classmethod
    def of_run(
        cls,
        config: Any,
        data_fingerprint: str,
        tokenizer_fingerprint: str | None,
        weights: str | None = None,
        history: list[dict[str, Any]] | None = None,
        data_changes: list[dict[str, Any]] | None = None,
    ) -> "TrainingRecord":
        """Return the record of a run at step 0 from its completed Config."""
        values, past = to_absolute_yaml(config), list(history or [])
        found = convergence_hash(values, data_fingerprint, tokenizer_fingerprint, weights, past)
        prints, changes = (data_fingerprint, tokenizer_fingerprint), list(data_changes or [])
        return cls(found, *prints, 0, values, weights, past, ROW_ORDER, changes)

    def write(self, directory: Path, step: int) -> None:
        """Write training.yaml of `step` into a checkpoint's directory."""
        content = asdict(self) | {"step": step}
        write_text(directory / TRAINING_FILE, yaml.safe_dump(content, sort_keys=False, allow_unicode=True))

    @classmethod
    def read(cls, directory: Path) -> "TrainingRecord | None":
        """Return the record in a checkpoint's directory, by today's names; None where there is none.

        UserError where it is damaged.
        """
        path = directory / TRAINING_FILE
        try:
            stored = read_yaml(path)
        except MissingFile:
            return None
        if not _is_record(stored):
            raise UserError(f"{path} cannot be read: it is no record of a training run")
        known = {name: stored[name] for name in cls.__dataclass_fields__ if name in stored}
        return cls(**(known | {"config": upgrade_node(stored["config"])}))


def weights_identity(load: str) -> str:
    """Return what identifies the weights that checkpoint.load=`load` names, wherever they lie.

    The weights of a run are known by its convergence hash and the step, on any layout and in any format.
    Others are known by their manifest, or without one by the sizes of their files and samples of the bytes.
    """
    checkpoint = find_checkpoint(load)
    record = TrainingRecord.read(checkpoint)
    if record is not None:
        return f"{record.convergence}, step {record.step}"
    entries = read_manifest(checkpoint)
    total = hashlib.sha256()
    if entries is not None:
        total.update(repr(sorted(entries.items())).encode())
    else:
        for path in sorted(path for path in checkpoint.iterdir() if path.suffix in TENSOR_FILES):
            total.update(f"{path.name} {path.stat().st_size}\n".encode())
            total.update(_sample(path))
    return total.hexdigest()[:HASH_LENGTH]


def _sample(path: Path) -> bytes:
    """Return blocks of a file's bytes, spread from its begin to its end."""
    size, blocks = path.stat().st_size, []
    with open_file(path) as file:
        for number in range(_BLOCKS):
            file.seek(max(0, size - _BLOCK_BYTES) * number // (_BLOCKS - 1))
            blocks.append(file.read(_BLOCK_BYTES))
    return b"".join(blocks)


def _is_record(stored: Any) -> bool:
    """Return True for a mapping with the keys of a record, each of its type."""
    if not isinstance(stored, Mapping):
        return False
    texts = all(isinstance(stored.get(f"{name}_fingerprint"), str | None) for name in ("data", "tokenizer"))
    past = stored.get("history", [])
    right = isinstance(past, list) and all(
        isinstance(each, Mapping)
        and type(each.get("step")) is int
        and isinstance(each.get("convergence"), str)
        for each in past
    )
    changes = stored.get("data_changes", [])
    right = right and changes == sound_changes(changes)
    numbers = all(type(number) is int for number in (stored.get("step"), stored.get("row_order", 1)))
    typed = isinstance(stored.get("convergence"), str) and numbers
    return texts and right and typed and isinstance(stored.get("config"), dict)


def sound_changes(stored: Any) -> list[dict[str, Any]]:
    """Return the entries among stored `data_changes` that have the keys of one, each of its type."""
    texts = ("from", "to", "what", "effect")
    return [
        dict(each)
        for each in (stored if isinstance(stored, list) else [])
        if isinstance(each, Mapping) and type(each.get("step")) is int
        if all(isinstance(each.get(name), str) for name in texts)
    ]
