"""Held-out loss."""

from dataclasses import dataclass
from itertools import islice

import torch

from dsv3.data.loader import evaluation_batches
from dsv3.data.packing import Rows
from dsv3.model.generation import inference
from dsv3.model.transformer import Transformer
from dsv3.runtime.distributed import Worker
from dsv3.training.loss import cross_entropy_sum, valid_tokens


@dataclass(frozen=True)
class Evaluation:
    """`loss` is the next-token cross-entropy in nats, mean over `tokens` valid tokens."""

    loss: float
    tokens: int


def evaluate(
    model: Transformer,
    rows: Rows,
    microbatch_size: int,
    worker: Worker,
    document_mask: bool,
    batches: int | None = None,
) -> Evaluation:
    """Score every row once over all ranks, or the first `batches` microbatches of each rank.

    The sums are kept in fp64, so that the mean does not depend on the number of rows.
    """
    total = torch.zeros(2, dtype=torch.float64, device=worker.device)
    with inference(model):
        for batch in islice(evaluation_batches(rows, microbatch_size, worker.rank, worker.world), batches):
            batch = batch.to(worker.device)
            output = model(batch.tokens, batch.documents if document_mask else None)
            total[0] += cross_entropy_sum(output.logits, batch.targets)
            total[1] += valid_tokens(batch)
    loss, tokens = worker.sum(total).tolist()
    return Evaluation(loss / max(tokens, 1), int(tokens))
