"""Make token shards in two processes, slowly, to be killed: python -m tests.tokens.killed_prepare IN OUT."""

import errno
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from dsv3.documents.document_files import ReadOptions
from dsv3.documents.input_files import find_files
from dsv3.documents.input_units import plan_units
from dsv3.tokens import prepare_shards, tokenize_unit
from dsv3.tokens.prepare_shards import HashedSides, Prepared
from dsv3.tokens.tokenizer import Tokenizer

OPTIONS = ReadOptions()

UNIT_BYTES = 12_000

SECONDS = 0.01
"""Seconds that a batch takes."""


class SlowSides(HashedSides):
    """Sides of documents that come slowly."""

    def documents(self, *args: Any) -> Any:
        """Yield documents, each after a moment, and set the size of batches in each process."""
        tokenize_unit.BATCH_CHARACTERS = 500
        for found in super().documents(*args):
            time.sleep(SECONDS)
            yield found


class DyingSides(HashedSides):
    """Sides whose reading ends its process as the kernel does for want of memory."""

    def documents(self, *args: Any) -> Any:
        """End the process at the third document."""
        for number, found in enumerate(super().documents(*args)):
            if number == 3:
                os.kill(os.getpid(), signal.SIGKILL)
            yield found


def _fails() -> Any:
    raise OSError(errno.ENOSPC, "No space left on device")


class FullSides(HashedSides):
    """Sides of documents that are written to a full disk."""

    def documents(self, *args: Any) -> Any:
        """Fail as a write does, when the first document is asked for."""
        yield from _fails()


def prepare(
    source: Path, output: Path, workers: int = 1, kind: type[HashedSides] = HashedSides, **more: Any
) -> Prepared:
    """Make the shards of the .jsonl files below `source`, with its tokenizer, in several small units."""
    units = plan_units(find_files([f"{source}/*.jsonl"]).files, OPTIONS, UNIT_BYTES)
    sides = kind(OPTIONS, 0.2)
    tokenizer = Tokenizer.from_file(source / "tokenizer")
    settings: dict[str, Any] = {"in_process_below": 0, "note_every": 0.0, **more}
    return prepare_shards.prepare_shards(
        output, units, sides, tokenizer, {"input": "the same"}, workers=workers, **settings
    )


if __name__ == "__main__":
    prepare(Path(sys.argv[1]), Path(sys.argv[2]), workers=2, kind=SlowSides)
