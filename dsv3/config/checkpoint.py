"""Schema of the `checkpoint` node: the checkpoint that a command reads and the ones that a run keeps."""

from dataclasses import dataclass, field
from pathlib import Path

from dsv3.config.registry import PATH
from dsv3.errors import require, require_positive

HF_PREFIX = "hf:"
"""`checkpoint.load=hf:DIR` reads a HuggingFace checkpoint."""


def absolute_path(text: str, or_name: bool = False, may_be_hf: bool = True) -> str:
    """Return a path as a run stores it: a URL as it is, and so a name of a hub where `or_name` allows it.

    With `may_be_hf` a leading hf: is kept and is no part of the path.
    """
    if "://" in text or (or_name and not Path(text).exists()):
        return text
    kind = HF_PREFIX if may_be_hf and text.startswith(HF_PREFIX) else ""
    return f"{kind}{Path(text.removeprefix(kind)).absolute()}"


@dataclass
class CheckpointConfig:
    """The checkpoint to read, and the ones that a run keeps.

    Other complete checkpoints are deleted once a newer one is committed.
    """

    load: str | None = field(default=None, metadata=PATH)
    """Run, step or DCP directory, or hf:DIR; a training run takes the weights only."""
    keep_last: int = 2
    """Newest complete checkpoints that stay."""
    keep_every: int | None = None
    """Checkpoints of steps that are multiples of this number stay too; null keeps no others."""
    keep_best: bool = False
    """The checkpoint with the lowest held-out loss stays too."""
    async_save: bool = True
    """Write checkpoints while the training goes on, from copies in the host's memory."""

    def validate(self) -> None:
        require(self.keep_last >= 1, "keep_last", self.keep_last, "must be at least 1")
        require_positive(self, "keep_every")
