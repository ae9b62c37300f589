"""Sampling: greedy, nucleus, batches of prompts, and what it leaves untouched."""

from dataclasses import replace

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from dsv3.model.generation import generate, sample
from tests.reference import MODEL, YARN, tiny_model

PROBABILITIES = torch.tensor([0.1, 0.4, 0.05, 0.25, 0.2])
PROMPTS = [[3, 1, 4], [1], [5, 9, 2, 6, 5, 3, 5, 8, 9], [7, 9]]


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
    assert generate(model, [[3, 1, 4]], 5, temperature=0.0, top_p=1.0, seed=0) == [ids[3:]]
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
    texts = [generate(model, [[1]], 8, temperature=1.0, top_p=0.9, seed=seed)[0] for seed in (0, 0, 1)]
    assert torch.equal(torch.get_rng_state(), state)
    assert texts[0] == texts[1] != texts[2]
    assert [len(text) for text in texts] == [8] * 3


def test_generation_stops_before_the_end() -> None:
    model = tiny_model()
    (text,) = generate(model, [[1]], 8, temperature=1.0, top_p=1.0, seed=0)
    place = next(n for n in range(1, 8) if text[n] not in text[:n])
    assert generate(model, [[1]], 8, 1.0, 1.0, 0, ends=[text[place], 10**6]) == [text[:place]]


def test_rows_of_a_batch_are_what_each_prompt_gives_alone() -> None:
    model = tiny_model(replace(MODEL, rope=replace(YARN, original_sequence_length=8)))
    found = generate(model, PROMPTS, 12, temperature=0.0, top_p=1.0, seed=0)
    for prompt, text in zip(PROMPTS, found, strict=True):
        assert generate(model, [prompt], 12, 0.0, 1.0, 0) == [text]
        ids = list(prompt)
        for _ in range(12):
            ids.append(int(model.eval()(torch.tensor([ids])).logits[0, -1].argmax()))
        assert ids[len(prompt) :] == text


def test_the_draws_of_a_row_do_not_depend_on_its_neighbours() -> None:
    model = tiny_model()
    texts = generate(model, PROMPTS, 12, temperature=1.0, top_p=0.9, seed=3)
    neighbours = [[1, 2, 3, 4], [2], PROMPTS[2], [8] * 12]
    assert generate(model, neighbours, 12, 1.0, 0.9, 3)[2] == texts[2]
    assert generate(model, PROMPTS[:3], 12, 1.0, 0.9, 3)[2] == texts[2]
    assert len(set(map(tuple, generate(model, [[1]] * 4, 12, 1.0, 0.9, 3)))) == 4


def test_rows_end_on_their_own_and_generation_with_the_last_of_them() -> None:
    model = tiny_model()
    texts = generate(model, PROMPTS, 40, temperature=1.0, top_p=1.0, seed=0)
    end = next(n for n in range(48) if all(n in text for text in texts) and n != texts[0][0])
    expected = [text[: text.index(end)] for text in texts]
    assert len({len(text) for text in expected}) > 1
    shapes: list[torch.Size] = []
    model.register_forward_pre_hook(lambda _, arguments: shapes.append(arguments[0].shape))
    assert generate(model, PROMPTS, 40, 1.0, 1.0, 0, [end]) == expected
    # The prompts once, then one token a row, until the longest row has drawn `end`.
    assert shapes == [(4, 9)] + [(4, 1)] * max(map(len, expected))


def test_no_more_forward_passes_than_tokens_and_none_for_no_prompts() -> None:
    model = tiny_model()
    shapes: list[torch.Size] = []
    model.register_forward_pre_hook(lambda _, arguments: shapes.append(arguments[0].shape))
    assert generate(model, [], 3, 1.0, 1.0, 0) == []
    assert generate(model, [[1], [2]], 0, 1.0, 1.0, 0) == [[], []]
    assert shapes == []
    prompts = [[1, 2], [3]]
    assert [len(text) for text in generate(model, prompts, 3, 1.0, 1.0, 0)] == [3, 3]
    assert len(shapes) == 3
    assert prompts == [[1, 2], [3]]


def test_an_empty_prompt_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one token"):
        generate(tiny_model(), [[1], []], 3, 1.0, 1.0, 0)


def test_a_logit_that_is_not_finite_is_an_error() -> None:
    model = tiny_model()
    with torch.no_grad():
        model.norm.weight.fill_(torch.nan)
    with pytest.raises(FloatingPointError):
        generate(model, [[1], [2, 3]], 3, 0.0, 1.0, 0)


@pytest.mark.parametrize("training", [True, False])
def test_generation_leaves_mode_load_and_gradients_as_they_were(training: bool) -> None:
    model = tiny_model(replace(MODEL, mtp_depths=2)).train(training)
    generate(model, [[1, 2]], 3, temperature=1.0, top_p=1.0, seed=0)
    assert model.training == training
    assert all(module.training == training for module in model.modules())
    assert not any(router.load.any() for router in model.routers())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_compiled_layers_are_not_compiled_again_for_generation() -> None:
    model, graphs = tiny_model(), CompileCounter()
    for layer in model.layers.values():
        layer.compile(backend=graphs)
    found = generate(model, PROMPTS, 3, 0.0, 1.0, 0)
    assert graphs.frame_count == 0
    assert found == generate(tiny_model(), PROMPTS, 3, 0.0, 1.0, 0)
