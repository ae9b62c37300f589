"""Measure the held-out loss: one mean over the valid tokens of all ranks."""

from contextlib import ExitStack
from itertools import islice
from typing import NamedTuple

import torch

from dsv3.data.loader import evaluation_batches
from dsv3.data.packing import RowDataset
from dsv3.distributed.process_group import RankContext
from dsv3.metrics.progress import phase
from dsv3.model.generation import inference
from dsv3.training.loss import valid_tokens
from dsv3.training.step import ForwardBackward


class Evaluation(NamedTuple):
    """The result of an evaluation, the same on every rank."""

    loss: float
    """Next-token cross-entropy in nats, the mean over `tokens`."""
    tokens: int
    """Valid targets that were scored."""


def evaluate(
    forward_backward: ForwardBackward,
    rows: RowDataset,
    microbatch_size: int,
    ranks: RankContext,
    batches: int | None = None,
) -> Evaluation:
    """Score every row once over all ranks, or only the first `batches` microbatches of each data share.

    Sums are fp64, so that the precision of the mean does not depend on the number of rows. The model's mode
    and gradients stay as they are. All ranks call it together.
    """
    total = torch.zeros(2, dtype=torch.float64, device=ranks.device)  # loss sum, valid tokens
    own = evaluation_batches(rows, microbatch_size, ranks.data_rank, ranks.data_world)
    count = -(-len(rows) // (microbatch_size * ranks.data_world))
    count = count if batches is None else min(count, batches)
    with ExitStack() as stack:
        work = stack.enter_context(phase("computing the held-out loss", count, "batches"))
        for part in forward_backward.model_parts:
            stack.enter_context(inference(part))
        for batch in islice(own, batches):
            batch = batch.to(ranks.device)
            total[0] += forward_backward.evaluate(batch)
            total[1] += valid_tokens(batch)
            work.advance()
        loss, tokens = ranks.sum(total).tolist()
    # Ranks that compute the same loss, or read the same rows, have each added it to the sums.
    tokens = round(tokens) // ranks.row_replicas
    return Evaluation(loss / ranks.loss_replicas / max(tokens, 1), tokens)
