"""Sampling text token by token."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from dsv3.model.transformer import Transformer


def generate(
    model: Transformer,
    prompt: list[int],
    max_tokens: int,
    temperature: float,
    top_p: float,
    seed: int,
    end: int | None = None,
) -> list[int]:
    """Up to `max_tokens` ids that continue the ids of `prompt`; stops before the id `end`.

    The draw depends on `seed` alone and leaves the global random state as it is. Sharded models
    generate on all ranks together: every rank draws the same ids.
    """
    device = model.head.weight.device
    generator = torch.Generator().manual_seed(seed)
    ids = list(prompt)
    with inference(model):
        for _ in range(max_tokens):
            logits = model(torch.tensor([ids], device=device)).logits[0, -1].float().cpu()
            token = sample(logits, temperature, top_p, generator)
            if token == end:
                break
            ids.append(token)
    return ids[len(prompt) :]


@contextmanager
def inference(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; the model's own mode comes back afterwards."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)


def sample(logits: Tensor, temperature: float, top_p: float, generator: torch.Generator) -> int:
    """One id from `logits` [vocab]: the likeliest at temperature 0, else drawn from the nucleus.

    The nucleus is the smallest set of likeliest ids whose probabilities reach `top_p`.
    FloatingPointError where a logit is not a number.
    """
    if not bool(logits.isfinite().all()):
        raise FloatingPointError("the model's logits are not finite")
    if temperature == 0:
        return int(logits.argmax())
    probabilities, ids = (logits / temperature).softmax(-1).sort(descending=True)
    outside = probabilities.cumsum(-1) - probabilities >= top_p
    drawn = torch.multinomial(probabilities.masked_fill(outside, 0.0), 1, generator=generator)
    return int(ids[drawn])
