"""The plan's bytes besides state against the tensors that live at the peak of a step on the meta device."""

import json

import pytest

from benchmarks.live_memory import RESULT, Case, cases, measure
from benchmarks.live_ranks import RankCase, measure_rank, rank_cases, shape_cases
from dsv3.model import head
from dsv3.planning import working_memory

TOLERANCE = 0.025

SMALL = [case for case in cases() if "model.dim=512" in case.overrides and "mtp_depths=1" in case.overrides]
"""Every precision times every recomputation; every second one has each of them."""

OTHERS = [
    Case(1, 4096, "model=671b model.num_layers=6 precision=bf16 recompute=full"),
    Case(16, 512, "model=debug precision=bf16 model.vocab_size=129280"),
    Case(32, 4096, "model=16b model.num_layers=2 model.vocab_size=512 precision=bf16 recompute=full"),
    Case(8, 512, "model=debug precision=bf16 data.document_mask=true"),
]
"""Peaks at a stack of experts beside MTP's gradient of the embedding, at the head, and at rows of experts."""


@pytest.mark.parametrize(
    "case", [*SMALL[::2], *OTHERS], ids=lambda case: f"{case.microbatch} {case.overrides}"
)
def test_the_plan_counts_what_lives_at_the_peak(case: Case) -> None:
    assert case in cases()
    found = measure(case.config())
    # Of what is computed again every tensor is counted; the rest saves some that are not told apart.
    tolerance = 0.005 if "recompute=full" in case.overrides else TOLERANCE
    assert found.planned == pytest.approx(found.live, rel=tolerance)


def test_the_stored_figures_are_of_every_case_and_within_the_tolerance() -> None:
    rows = json.loads(RESULT.read_text())["cases"]
    assert [Case(row["microbatch"], row["length"], row["overrides"]) for row in rows] == cases()
    assert all(row["planned"] == pytest.approx(row["live"], rel=TOLERANCE) for row in rows)


RANKS = [
    case
    for case in rank_cases()
    if (case.rank == 3 and "ZBVZeroBubble" in case.overrides) or "tp_ep precision=fp32" in case.overrides
]
"""Peaks at microbatches between the halves of their backward passes, and at the sum of experts' results."""


@pytest.mark.parametrize("case", RANKS, ids=lambda case: f"{case.rank} of {case.world} {case.overrides}")
def test_the_plan_counts_what_a_rank_allocates(case: RankCase) -> None:
    assert measure_rank(case).ratio == pytest.approx(1, abs=0.05)


def test_the_stored_figures_of_ranks_are_of_every_case_and_at_most_5_percent_too_low() -> None:
    rows = json.loads(RESULT.read_text())["ranks"]
    stored = [RankCase(row["world"], row["rank"], row["overrides"]) for row in rows]
    assert stored == [*rank_cases(), *shape_cases()]
    assert all(0.95 <= row["planned"] / row["live"] <= 1.06 for row in rows)


def test_the_plan_knows_the_size_of_the_heads_chunk() -> None:
    assert working_memory.HEAD_CHUNK_BYTES == head.CHUNK_BYTES
