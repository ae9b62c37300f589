"""The copies of embedding and head that MTP layers are released with: shared here, so they must be equal."""

from concurrent.futures import ThreadPoolExecutor

import torch

from dsv3.checkpoint.released.names import SCALE, copies
from dsv3.checkpoint.released.source import ReleasedSource
from dsv3.checkpoint.released.stored_tensor import fault, quoted
from dsv3.convert.pieces import row_slices
from dsv3.model.config import ModelConfig


def require_equal_copies(source: ReleasedSource, model: ModelConfig, workers: int) -> None:
    """UserError for a copy that differs from what it is a copy of: it would be lost without a word."""
    pairs = [(copy, name) for copy, name in copies(model).items() if copy in source.stored]
    with ThreadPoolExecutor(workers) as pool:
        for (copy, name), equal in zip(
            pairs, pool.map(lambda pair: _equal(source, *pair), pairs), strict=True
        ):
            if not equal:
                raise fault(
                    source.stored[copy].file,
                    f"has {quoted(copy)} that is not equal to '{name}': here an MTP layer shares it",
                )


def _equal(source: ReleasedSource, copy: str, name: str) -> bool:
    one, other = source.stored[copy], source.stored[name]
    if (one.shape, one.dtype) != (other.shape, other.dtype):
        return False
    slices = row_slices(one.shape, one.dtype.itemsize)
    scales = [(copy + SCALE, name + SCALE)] if source.is_quantized(copy) else []
    if not all(pair[0] in source.stored and _equal(source, *pair) for pair in scales):
        return False
    return all(torch.equal(source.raw(copy, *rows), source.raw(name, *rows)) for rows in slices)
