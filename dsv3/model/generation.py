"""Sample text token by token, for several prompts at once: prefill, then decode from the KV cache."""

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from dsv3.model.kv_cache import LatentCache
from dsv3.model.transformer import Transformer

ROW_SEED_STRIDE = 0x9E3779B97F4A7C15
"""Distance between the seeds of two rows: odd, so that no two rows of a batch share a seed, and far from
the distance of seeds that are used together (0, 1, 2, or the numbers of training steps)."""


class NextLogits(Protocol):
    """A callable that returns the next token's logits; generate() hands it each row's new ids in turn."""

    def __call__(self, new: list[list[int]]) -> Tensor:
        """Return logits [rows, vocab] for the token after the ids `new` of each row."""


class CachedLogits:
    """Prefill and decode with a KV cache; the model may be sharded, but its rows and layers are not split."""

    def __init__(self, model: Transformer, rows: int, capacity: int) -> None:
        self.model = model
        device = model.head.weight.device
        self.cache = LatentCache(model.config, rows, capacity, model.compute_dtype, device)

    def __call__(self, new: list[list[int]]) -> Tensor:
        """Return logits [rows, vocab] for the token after the ids `new` of each row."""
        return next_logits(self.model, new, self.cache)


def generate(
    model: Transformer,
    prompts: list[list[int]],
    max_tokens: int,
    temperature: float,
    top_p: float,
    seed: int,
    ends: Collection[int] = (),
    logits_of: NextLogits | None = None,
) -> list[list[int]]:
    """Return up to `max_tokens` ids that continue each of `prompts`; a row stops before one of `ends`.

    The draws of a row depend only on `seed` and the row's number, not on its neighbours, and leave the global
    random state unchanged. Sharded models generate on all ranks together: every rank draws the same
    ids and makes the same number of forward passes. `logits_of` replaces the KV cache for a
    model whose rows or layers are split over ranks. Raises ValueError if a prompt is empty.
    """
    capacity = max(map(len, prompts), default=0) + max_tokens
    logits_of = logits_of or CachedLogits(model, len(prompts), capacity)
    # Row 0 draws what `seed` itself gives.
    generators = [
        torch.Generator().manual_seed((seed + row * ROW_SEED_STRIDE) % 2**64) for row in range(len(prompts))
    ]
    texts: list[list[int]] = [[] for _ in prompts]
    new, running = list(prompts), list(range(len(prompts)))
    # Each step has its own shapes, and compiling for them takes longer than generating the text.
    with inference(model), torch.compiler.set_stance("force_eager"):
        for _ in range(max_tokens if prompts else 0):
            logits = logits_of(new).cpu()
            # A row that has ended goes on with its last id as input; its output is ignored.
            for row in running:
                new[row] = [sample(logits[row], temperature, top_p, generators[row])]
            running = [row for row in running if new[row][0] not in ends]
            for row in running:
                texts[row] += new[row]
            if not running:
                break
    return texts


def next_logits(model: Transformer, new: list[list[int]], cache: LatentCache) -> Tensor:
    """Add the ids `new` of each row to `cache` and return logits [B, vocab] for the token after them."""
    tokens = pad_sequence([torch.tensor(ids) for ids in new], batch_first=True)
    step = cache.extend([len(ids) for ids in new])
    logits: Tensor = model(tokens.to(cache.entries.device), cache=step).logits
    return logits[:, -1]


@contextmanager
def inference(model: nn.Module) -> Iterator[None]:
    """Switch to evaluation mode without gradients; restore the model's own mode afterwards."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)


def sample(logits: Tensor, temperature: float, top_p: float, generator: torch.Generator) -> int:
    """Pick one id from `logits` [vocab]: the most likely at temperature 0, else a draw from the nucleus.

    The nucleus is the smallest set of most likely ids whose probabilities sum to `top_p`.
    Raises FloatingPointError if a logit is not finite.
    """
    if not bool(logits.isfinite().all()):
        raise FloatingPointError("the model's logits are not finite")
    if temperature == 0:
        return int(logits.argmax())
    probabilities, ids = (logits / temperature).softmax(-1).sort(descending=True)
    outside = probabilities.cumsum(-1) - probabilities >= top_p
    drawn = torch.multinomial(probabilities.masked_fill(outside, 0.0), 1, generator=generator)
    return int(ids[drawn])
