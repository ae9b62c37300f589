"""Which checkpoint a command reads and which ones a run keeps."""

from dataclasses import dataclass

from dsv3.errors import require, require_positive

HF_PREFIX = "hf:"
"""`checkpoint.load=hf:DIR` reads a HuggingFace checkpoint."""


@dataclass
class CheckpointConfig:
    """`load` is a run, step or DCP directory, of which a training run takes the weights only.

    The `keep_last` newest complete checkpoints stay, those of steps that are multiples of `keep_every`
    and, with `keep_best`, that with the lowest held-out loss; others go once a newer one is committed.
    With `async_save` they are written while the training goes on, from copies in the host's memory.
    """

    load: str | None = None
    keep_last: int = 2
    keep_every: int | None = None
    keep_best: bool = False
    async_save: bool = True

    def validate(self) -> None:
        require(self.keep_last >= 1, "keep_last", self.keep_last, "must be at least 1")
        require_positive(self, "keep_every")
