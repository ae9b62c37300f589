"""Sampling: greedy, nucleus, and what it leaves untouched."""

from dataclasses import replace

import pytest
import torch

from dsv3.model.generation import generate, sample
from tests.reference import MODEL, tiny_model

PROBABILITIES = torch.tensor([0.1, 0.4, 0.05, 0.25, 0.2])


def drawn(temperature: float, top_p: float, count: int = 4000) -> list[float]:
    """How often each id is drawn."""
    generator = torch.Generator().manual_seed(0)
    ids = [sample(PROBABILITIES.log(), temperature, top_p, generator) for _ in range(count)]
    return [ids.count(n) / count for n in range(5)]


def test_temperature_zero_takes_the_likeliest_id_each_time() -> None:
    model = tiny_model().eval()
    ids = [3, 1, 4]
    for _ in range(5):
        ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    assert generate(model, [3, 1, 4], 5, temperature=0.0, top_p=1.0, seed=0) == ids[3:]
    assert drawn(0.0, 1.0, 3) == [0, 1, 0, 0, 0]


def test_ids_are_drawn_by_their_probability_and_the_temperature() -> None:
    assert drawn(1.0, 1.0) == pytest.approx(PROBABILITIES.tolist(), abs=0.03)
    squared = PROBABILITIES.square() / PROBABILITIES.square().sum()
    assert drawn(0.5, 1.0) == pytest.approx(squared.tolist(), abs=0.03)


def test_the_nucleus_is_the_smallest_set_that_reaches_top_p() -> None:
    assert drawn(1.0, 0.3, 100) == [0, 1, 0, 0, 0]
    assert drawn(1.0, 0.6) == pytest.approx([0, 0.4 / 0.65, 0, 0.25 / 0.65, 0], abs=0.03)
    assert drawn(1.0, 0.7) == pytest.approx([0, 0.4 / 0.85, 0, 0.25 / 0.85, 0.2 / 0.85], abs=0.03)


def test_the_draw_depends_on_the_seed_alone_and_leaves_the_global_state() -> None:
    model = tiny_model()
    state = torch.get_rng_state()
    texts = [generate(model, [1], 8, temperature=1.0, top_p=0.9, seed=seed) for seed in (0, 0, 1)]
    assert torch.equal(torch.get_rng_state(), state)
    assert texts[0] == texts[1] != texts[2]
    assert [len(text) for text in texts] == [8] * 3


def test_generation_stops_before_the_end() -> None:
    model = tiny_model()
    text = generate(model, [1], 8, temperature=1.0, top_p=1.0, seed=0)
    place = next(n for n in range(1, 8) if text[n] not in text[:n])
    assert generate(model, [1], 8, 1.0, 1.0, 0, end=text[place]) == text[:place]


@pytest.mark.parametrize("training", [True, False])
def test_generation_leaves_mode_load_and_gradients_as_they_were(training: bool) -> None:
    model = tiny_model(replace(MODEL, mtp_depths=2)).train(training)
    generate(model, [1, 2], 3, temperature=1.0, top_p=1.0, seed=0)
    assert model.training == training
    assert all(module.training == training for module in model.modules())
    assert not any(router.load.any() for router in model.routers())
    assert all(parameter.grad is None for parameter in model.parameters())
