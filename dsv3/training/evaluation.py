"""Measure the held-out loss: one mean over the valid tokens of all ranks.

An evaluation may score a part of the held-out rows. They are the same ones each time and on every layout.
"""

from collections.abc import Mapping
from contextlib import ExitStack
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from dsv3.config.training import scored_rows
from dsv3.data.loader import evaluation_batches
from dsv3.data.mixture import HeldOutSources
from dsv3.data.packing import PackedRow, RowDataset
from dsv3.distributed.process_group import RankContext
from dsv3.metrics.progress import phase
from dsv3.model.generation import inference
from dsv3.training.loss import valid_tokens
from dsv3.training.step import ForwardBackward

NO_TARGET = "unknown: no target in the held-out rows"
"""The held-out loss in words, where there is none."""


class Evaluation(NamedTuple):
    """The result of an evaluation, the same on every rank."""

    loss: float | None
    """Next-token cross-entropy in nats, the mean over `tokens`; None where there are none."""
    tokens: int
    """Valid targets that were scored."""
    sources: Mapping[str, "Evaluation"] = {}
    """The same by source of a mixture."""


class SpreadRows:
    """Some of the rows of a dataset, evenly spread over it: held-out documents stand in an order."""

    def __init__(self, rows: RowDataset, count: int) -> None:
        self.rows = rows
        self.count = count
        self.sequence_length = rows.sequence_length

    def __len__(self) -> int:
        """Return the number of rows."""
        return self.count

    def row(self, index: int) -> PackedRow:
        """Return the row at `index`, 0 <= index < len."""
        return self.rows.row(index * len(self.rows) // self.count)


def rows_to_score(rows: RowDataset, tokens: int | None) -> RowDataset:
    """Return the rows of an evaluation of about so many `tokens`, at least one; all of them for None.

    Of a mixture each source has the share of them that it has of all held-out rows, and at least one row.
    """
    count = scored_rows(len(rows), rows.sequence_length, tokens)
    if count == len(rows):
        return rows
    if not isinstance(rows, HeldOutSources):
        return SpreadRows(rows, count)
    # One row each, and of what is then left the share that adds up to count.
    left, of = max(0, count - len(rows.sources)), max(1, len(rows) - len(rows.sources))
    bounds = [(start - number) * left // of for number, start in enumerate(rows.starts)]
    shares = {
        name: 1 + end - first for name, (first, end) in zip(rows.sources, pairwise(bounds), strict=True)
    }
    return HeldOutSources({name: SpreadRows(rows.sources[name], share) for name, share in shares.items()})


def evaluate(
    forward_backward: ForwardBackward,
    rows: RowDataset,
    microbatch_size: int,
    ranks: RankContext,
    tokens: int | None = None,
) -> Evaluation:
    """Score every row once over all ranks, or rows of about so many `tokens` (`rows_to_score`).

    Sums are fp64, so that the precision of the mean does not depend on the number of rows. The model's mode
    and gradients stay as they are. All ranks call it together. The sources of a mixture are scored one after
    the other, each in batches of its own.
    """
    rows = rows_to_score(rows, tokens)
    sources = rows.sources if isinstance(rows, HeldOutSources) else {"": rows}
    # By source loss sum and valid tokens.
    total = torch.zeros(len(sources), 2, dtype=torch.float64, device=ranks.device)
    count = sum(-(-len(source) // (microbatch_size * ranks.data_world)) for source in sources.values())
    with ExitStack() as stack:
        work = stack.enter_context(phase("computing the held-out loss", count, "batches", together=True))
        for part in forward_backward.model_parts:
            stack.enter_context(inference(part))
        for own, source in zip(total, sources.values(), strict=True):
            for batch in evaluation_batches(source, microbatch_size, ranks.data_rank, ranks.data_world):
                batch = batch.to(ranks.device)
                own[0] += forward_backward.evaluate(batch)
                own[1] += valid_tokens(batch)
                work.advance()
        total = ranks.sum(total)
    found = _mean(total.sum(0), ranks)
    if not isinstance(rows, HeldOutSources):
        return found
    return found._replace(sources={name: _mean(own, ranks) for name, own in zip(sources, total, strict=True)})


def _mean(total: Tensor, ranks: RankContext) -> Evaluation:
    """Return the mean loss of a sum of losses and a count of valid tokens, both over all ranks."""
    loss, valid = total.tolist()
    # Ranks that compute the same loss, or read the same rows, have each added it to the sums.
    valid = round(valid) // ranks.row_replicas
    return Evaluation(loss / ranks.loss_replicas / valid if valid else None, valid)
