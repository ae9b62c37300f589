"""Sample text token by token, for several prompts at once: prefill, then decode from the KV cache.

The prompts take one forward pass, and every further token one pass over one token per row. On several ranks
all of them make the passes together, one rank draws the ids, and the others get them (`ShareDraws`): ranks
that drew for themselves could part ways over a rounding difference.
"""

import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor, nn

from dsv3.model.kv_cache import CacheStep, LatentCache
from dsv3.model.transfers import upload
from dsv3.model.transformer import Transformer

ROW_SEED_STRIDE = 0x9E3779B97F4A7C15
"""Distance between the seeds of two rows: odd, so that no two rows of a batch share a seed, and far from
the distance of seeds that are used together (0, 1, 2, or the numbers of training steps)."""


NONFINITE = -1
"""Stands for an id where the model's logits are not finite, so that all ranks hear of it."""

ShareDraws = Callable[[Tensor], Tensor]
"""(int64 values) -> those of the rank that draws, on every rank."""


class NextLogits(Protocol):
    """A callable that returns the next token's logits; generate() hands it each row's new ids in turn."""

    def __call__(self, new: list[list[int]]) -> Tensor | None:
        """Return logits [rows, vocab] for the token after the ids `new` of each row; None: draw nothing here.

        Exactly one of the ranks gets logits.
        """


class Forward(Protocol):
    """A forward pass of all ranks over new tokens; `last_logits` is that of a model on one rank."""

    def __call__(self, tokens: Tensor, step: CacheStep) -> Tensor | None:
        """Return logits [rows, vocab] of each row's last token; None where another rank has them."""


def last_logits(model: Transformer, tokens: Tensor, step: CacheStep) -> Tensor:
    """Pass `tokens` [rows, T] through `model` and return logits [rows, vocab] of each row's last token."""
    logits: Tensor = model(tokens, cache=step).logits
    return logits[:, -1]


class CachedLogits:
    """The NextLogits of prefill and decode with a KV cache.

    `multiples` are those of the tokens per row in the prefill and in every later pass, where ranks share a
    row's tokens; padding fills them up.
    """

    def __init__(self, forward: Forward, cache: LatentCache, multiples: tuple[int, int] = (1, 1)) -> None:
        self.forward = forward
        self.cache = cache
        self.multiples = multiples

    def __call__(self, new: list[list[int]]) -> Tensor | None:
        """Add the ids `new` of each row to the cache and return the logits after them; see NextLogits."""
        step = self.cache.extend([len(ids) for ids in new], self.multiples[any(self.cache.lengths)])
        tokens = torch.zeros(step.positions.shape, dtype=torch.int64)
        for row, ids in enumerate(new):
            tokens[row, : len(ids)] = torch.tensor(ids)
        return self.forward(upload(tokens, step.positions.device), step)


@dataclass
class TimeLimit:
    """The seconds that a sample may take; the rank that draws decides by its clock, after each token."""

    seconds: float
    reached: bool = False
    """The text was cut off; equal on all ranks."""


def generate(
    model: Transformer,
    prompts: list[list[int]],
    max_tokens: int,
    temperature: float,
    top_p: float,
    seed: int,
    ends: Collection[int] = (),
    logits_of: NextLogits | None = None,
    share: ShareDraws = lambda values: values,
    limit: TimeLimit | None = None,
) -> list[list[int]]:
    """Return up to `max_tokens` ids that continue each of `prompts`; a row stops before one of `ends`.

    The draws of a row depend only on `seed` and the row's number, not on its neighbours, and leave the global
    random state unchanged. On several ranks `logits_of` makes the passes and `share` tells what was drawn, so
    that all ranks make the same number of passes and return the same ids; without them `model` is whole. All
    rows stop when `limit` is reached.

    Raises:
        ValueError: a prompt is empty.
        FloatingPointError: a logit is not finite; on every rank.
    """
    if logits_of is None:
        capacity = max(map(len, prompts), default=0) + max_tokens
        device = model.head.weight.device
        cache = LatentCache(model.config, len(prompts), capacity, model.compute_dtype, device)
        logits_of = CachedLogits(partial(last_logits, model), cache)
    # Row 0 draws what `seed` itself gives.
    generators = [
        torch.Generator().manual_seed((seed + row * ROW_SEED_STRIDE) % 2**64) for row in range(len(prompts))
    ]
    texts: list[list[int]] = [[] for _ in prompts]
    new, running = list(prompts), list(range(len(prompts)))
    started = time.monotonic()
    # Each step has its own shapes, and compiling for them takes longer than generating the text.
    with inference(model), torch.compiler.set_stance("force_eager"):
        for _ in range(max_tokens if prompts else 0):
            logits = logits_of(new)
            # One value per row, and at the end if the time is over.
            drawn = torch.zeros(len(prompts) + 1, dtype=torch.int64)
            if logits is not None:
                logits = logits.cpu()
                for row in running:
                    drawn[row] = _sample_or_tell(logits[row], temperature, top_p, generators[row])
                drawn[-1] = limit is not None and time.monotonic() - started > limit.seconds
            *ids, over = share(drawn).tolist()
            if NONFINITE in ids:
                raise FloatingPointError("the model's logits are not finite")
            # A row that has ended goes on with its last id as input; its output is ignored.
            for row in running:
                new[row] = [ids[row]]
            running = [row for row in running if new[row][0] not in ends]
            for row in running:
                texts[row] += new[row]
            if not running:
                break
            if over and limit is not None:
                limit.reached = True
                break
    return texts


def _sample_or_tell(logits: Tensor, temperature: float, top_p: float, generator: torch.Generator) -> int:
    """Return the id that `sample` picks, or NONFINITE."""
    try:
        return sample(logits, temperature, top_p, generator)
    except FloatingPointError:
        return NONFINITE


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
