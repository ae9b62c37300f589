"""Scale grids: checked before a conversion begins, and written as pieces."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from torch import Tensor

from dsv3.checkpoint.released.names import SCALE
from dsv3.checkpoint.released.source import ReleasedSource
from dsv3.convert.hf_target import Shard
from dsv3.convert.sink import Sink


def require_sound_scales(source: ReleasedSource, workers: int) -> None:
    """UserError for a scale that is not above 0; read in the order of the files, a few MB of each."""
    stored = source.stored
    names = [tensor.name for tensor in source.layout if source.is_quantized(tensor.name)]
    names.sort(key=lambda name: (str(stored[name + SCALE].file), stored[name + SCALE].offset))
    with ThreadPoolExecutor(workers) as pool:
        for _ in pool.map(source.scales, names):
            pass


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
