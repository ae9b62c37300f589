"""Generation: every layout draws what one process draws, from a KV cache, all ranks together."""

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from dsv3.config.root import Config
from dsv3.model.generation import TimeLimit
from dsv3.model.kv_cache import CacheStep
from dsv3.parallel.parallel_model import build_parallel_model
from dsv3.planning.layout import ParallelDims
from tests.harness.pool import Pool
from tests.parallel.tiny_training import configured, mesh_of

PROMPTS = [[5, 6, 7, 8, 9], [1, 2], [3]]
TOKENS = 4
LAYOUTS = {
    "fsdp, ep": (ParallelDims(dp_shard=2, ep=2), "1F1B"),
    "tp": (ParallelDims(tp=2), "1F1B"),
    "cp": (ParallelDims(cp=2), "1F1B"),
    "pp": (ParallelDims(pp=2), "1F1B"),
    "pp in a V, fsdp": (ParallelDims(pp=2, dp_shard=2), "DualPipeV"),
    "pp x cp x tp, ep": (ParallelDims(pp=2, cp=2, tp=2, ep=4), "1F1B"),
}


class Generated(NamedTuple):
    """What one rank returns and computes."""

    greedy: list[list[int]]
    drawn: list[list[int]]
    cut: list[list[int]]
    """With no time at all."""
    shapes: list[tuple[int, int]]
    """Rows and tokens per row of each forward pass of the greedy generation."""
    logits: list[Tensor]
    """Those of each pass, where this rank has the head."""
    cached: list[tuple[int, ...]]
    """Shape of the cache in each pass."""


def generate_ids(config: Config, degrees: ParallelDims | None) -> Generated | None:
    """Generate greedily, at random, in no time, and from broken weights; None on ranks that are left out."""
    mesh = mesh_of(degrees) if degrees else None
    if degrees and torch.distributed.get_rank() >= degrees.world_size:
        return None
    model = build_parallel_model(config, mesh, torch.device("cpu"))
    shapes: list[tuple[int, int]] = []
    logits: list[Tensor] = []
    cached: list[tuple[int, ...]] = []
    forward = model.forward_backward.next_logits

    def recorded(tokens: Tensor, step: CacheStep) -> Tensor | None:
        found = forward(tokens, step)
        shapes.append((tokens.shape[0], tokens.shape[1]))
        cached.append(tuple(step.entries.shape))
        logits.extend([] if found is None else [found])
        return found

    model.forward_backward.next_logits = recorded  # type: ignore[method-assign]
    greedy = model.generate(PROMPTS, TOKENS, 0.0, 0.9, 3, ())
    first = Generated(greedy, [], [], shapes[:], logits[:], cached[:])
    limit = TimeLimit(0.0)
    drawn, cut = (model.generate(PROMPTS, TOKENS, 0.8, 0.9, 3, (), given) for given in (None, limit))
    assert limit.reached
    for part in model.model_parts:
        if part.norm is not None:
            torch.nn.init.constant_(part.norm.weight, torch.nan)
    with pytest.raises(FloatingPointError, match="not finite"):
        model.generate(PROMPTS, TOKENS, 0.0, 0.9, 3, ())
    return first._replace(drawn=drawn, cut=cut)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_rank_draws_what_one_process_draws_token_by_token(pool: Pool, layout: str) -> None:
    expected = generate_ids(configured(["precision=fp32"], 2), None)
    assert expected is not None
    assert all(len({tuple(row) for row in rows}) == 3 for rows in (expected.greedy, expected.drawn))
    assert expected.cut == [row[:1] for row in expected.drawn]
    degrees, schedule = LAYOUTS[layout]
    config = configured(["parallel=fsdp", "precision=fp32", f"parallel.schedule={schedule}"], 1)
    found = pool.run(generate_ids, config, degrees)[: degrees.world_size]
    # The prompts once, then a token per row, padded to what the ranks of a row share.
    prefill = {"tp": 6, "cp": 8, "pp x cp x tp, ep": 8}.get(layout, 5)
    with_head = 0
    for rank in found:
        assert (rank.greedy, rank.drawn, rank.cut) == expected[:3]
        assert rank.shapes == [(3, prefill)] + [(3, degrees.tp)] * (TOKENS - 1)
        assert len({shape[0] for shape in rank.cached}) == 1
        with_head += bool(rank.logits)
        for own, whole in zip(rank.logits, expected.logits, strict=bool(rank.logits)):
            torch.testing.assert_close(own, whole, rtol=0, atol=1e-4)
    assert with_head == degrees.world_size // degrees.pp
    # Every stage caches its own layers alone.
    assert sum(rank.cached[0][0] for rank in found) == 4 * degrees.world_size // degrees.pp


def test_bf16_differs_from_one_process_by_rounding_alone(pool: Pool) -> None:
    expected = generate_ids(configured(["precision=bf16"], 2), None)
    assert expected is not None
    degrees, _ = LAYOUTS["pp x cp x tp, ep"]
    found = pool.run(generate_ids, configured(["parallel=fsdp", "precision=bf16"], 2), degrees)
    assert all(rank.drawn == found[0].drawn for rank in found[: degrees.world_size])
    first = next(rank.logits[0] for rank in found if rank.logits)
    scale = expected.logits[0].abs().max()
    assert (first - expected.logits[0]).abs().max() < 0.03 * scale
