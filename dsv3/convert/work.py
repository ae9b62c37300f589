"""What a conversion is to write."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from dsv3.convert.journal import Finished
from dsv3.convert.pieces import Output


@dataclass(frozen=True)
class Work:
    """The files, and what adds the small ones that need all of them to be there."""

    outputs: list[Output]
    complete: Callable[[Path, list[Finished]], None]

    @property
    def nbytes(self) -> int:
        """Bytes to be written."""
        return sum(output.nbytes for output in self.outputs)
