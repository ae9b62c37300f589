"""Read a run's checkpoints tensor by tensor, and forge their manifests."""

import json
from pathlib import Path
from typing import Any

import torch

from dsv3.checkpoint.dcp_metadata import load_tensors, read_metadata
from dsv3.checkpoint.directory import MANIFEST_FILE, complete_steps
from dsv3.checkpoint.manifest import write_manifest
from dsv3.tokens.file_digests import FileEntry


def tensors(step: Path) -> dict[str, bytes]:
    """Return every tensor of a checkpoint as bytes."""
    entries: dict[str, Any] = dict(read_metadata(step).state_dict_metadata)
    loaded = {name: torch.empty(entry.size, dtype=entry.properties.dtype) for name, entry in entries.items()}
    load_tensors(step, loaded)
    return {name: as_bytes(tensor) for name, tensor in loaded.items()}


def as_bytes(tensor: torch.Tensor) -> bytes:
    """Return a tensor's memory, which tells -0.0 from 0.0 and one NaN from another."""
    return tensor.reshape(-1).view(torch.uint8).numpy().tobytes()


def last_tensors(run_dir: Path) -> dict[str, bytes]:
    """Return every tensor of a run's last checkpoint as bytes."""
    return tensors(complete_steps(run_dir)[-1])


def seal(step: Path) -> None:
    """Make the manifest fit the files of a checkpoint: an attacker who writes one file can write that too."""
    files = (path for path in step.rglob("*") if path.is_file() and path.name != MANIFEST_FILE)
    write_manifest(step, {str(path.relative_to(step)): FileEntry.of(path) for path in files})


def unseal(step: Path) -> None:
    """Make a checkpoint one of the time before manifests."""
    (step / MANIFEST_FILE).unlink()
    stored = json.loads((step / "state.json").read_text())
    del stored["manifest"], stored["evaluation_loss"]
    (step / "state.json").write_text(json.dumps(stored))
