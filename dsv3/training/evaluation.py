"""Held-out loss."""

from contextlib import ExitStack
from dataclasses import dataclass
from itertools import islice

import torch

from dsv3.data.loader import evaluation_batches
from dsv3.data.packing import Rows
from dsv3.distributed.process_group import RankContext
from dsv3.model.generation import inference
from dsv3.training.forward_backward import ForwardBackward
from dsv3.training.loss import valid_tokens


@dataclass(frozen=True)
class Evaluation:
    """`loss` is the next-token cross-entropy in nats, mean over `tokens` valid tokens."""

    loss: float
    tokens: int


def evaluate(
    forward_backward: ForwardBackward,
    rows: Rows,
    microbatch_size: int,
    ranks: RankContext,
    batches: int | None = None,
) -> Evaluation:
    """Score every row once over all ranks, or the first `batches` microbatches of each rank.

    The sums are kept in fp64, so that the mean does not depend on the number of rows.
    """
    total = torch.zeros(2, dtype=torch.float64, device=ranks.device)
    shares = (ranks.data_rank, ranks.data_world)
    with ExitStack() as stack:
        for part in forward_backward.parts:
            stack.enter_context(inference(part))
        for batch in islice(evaluation_batches(rows, microbatch_size, *shares), batches):
            batch = batch.to(ranks.device)
            total[0] += forward_backward.evaluate(batch)
            total[1] += valid_tokens(batch)
    loss, tokens = ranks.sum(total).tolist()
    tokens = round(tokens) // ranks.row_replicas
    return Evaluation(loss / ranks.loss_replicas / max(tokens, 1), tokens)
