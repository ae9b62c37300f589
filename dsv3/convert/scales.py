"""Scale grids as pieces."""

from dataclasses import dataclass

from torch import Tensor

from dsv3.checkpoint.released import ReleasedSource
from dsv3.convert.hf_target import Shard
from dsv3.convert.sink import Sink


@dataclass(frozen=True)
class ScaleGrid:
    """The scales of one weight, written under its name: a few KB to a few hundred."""

    shard: Shard
    source: ReleasedSource
    name: str

    def make(self, buffer: Tensor) -> Tensor:
        """The grid as it is stored."""
        grid = self.source.scales(self.name)
        assert grid is not None
        return grid

    def put(self, made: Tensor, sink: Sink) -> None:
        """Append it."""
        self.shard.open(sink).write(self.name, made)
