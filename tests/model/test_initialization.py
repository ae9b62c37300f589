"""Initial weights: their distribution, and what their values depend on."""

import hashlib
import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from dsv3.model.initialization import NormalValues, Shard, initialize
from dsv3.model.transformer import Transformer
from tests.reference import MODEL, MOE, tiny_model

SMALL = replace(MODEL, init_std=0.02)


def values(model: Transformer, seed: int = 0) -> dict[str, Tensor]:
    """The initialised parameters by name."""
    initialize(model, seed)
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def test_every_parameter_is_filled_whatever_was_there_before() -> None:
    one, other = tiny_model(SMALL, seed=1), tiny_model(SMALL, seed=2)
    for parameter in one.parameters():
        parameter.data.fill_(torch.nan)
    for found, right in zip(values(one).values(), values(other).values(), strict=True):
        assert torch.equal(found, right)


def test_matrices_have_the_configured_deviation_and_norms_are_one() -> None:
    for name, value in values(tiny_model(SMALL)).items():
        if "norm" in name:
            assert value.tolist() == [1.0] * len(value)
        else:
            # Four standard errors of the deviation and of the mean.
            error = 4 * 0.02 * value.numel() ** -0.5
            assert abs(value.std().item() - 0.02) < error
            assert abs(value.mean().item()) < error


def box(shape: tuple[int, ...], offset: tuple[int, ...], name: str = "any", std: float = 1.0) -> Tensor:
    """A box of the initial values of a parameter, in memory that held something else."""
    out = torch.full(shape, torch.nan)
    NormalValues(std, seed=0).fill(out, offset, name)
    return out


def test_initial_values_are_normal_and_independent() -> None:
    value = box((4, 512, 768), (0, 0, 0), std=0.006) / 0.006
    numbers = value.double().flatten().sort().values
    middle = (torch.arange(len(numbers)) + 0.5) / len(numbers)
    distance = (torch.erfc(-numbers / 2**0.5) / 2 - middle).abs().max() * len(numbers) ** 0.5
    assert distance < 1.95  # Kolmogorov and Smirnov's, passed with a probability of 0.999
    for power in (1, 2):  # neighbours in a row, the two of a pair among them, in a column and in the stack
        x = value.double() ** power - (power - 1)
        for one, other in ((x[..., 1:], x[..., :-1]), (x[:, 1:], x[:, :-1]), (x[1:], x[:-1])):
            correlation = (one * other).mean() / power * one.numel() ** 0.5
            assert abs(correlation) < 4
    # Marchenko and Pastur's edges of the singular values, of which structure in a matrix would leave many.
    singular = torch.linalg.svdvals(value[0]) / 768**0.5
    edge = (512 / 768) ** 0.5
    assert (singular[0].item(), singular[-1].item()) == pytest.approx((1 + edge, 1 - edge), abs=0.02)


@pytest.mark.parametrize(
    ("place", "lanes"), [((3, 9, 11), 70), ((0, 0, 0), 70_000), ((255, 2**21, 65_530), 12)]
)
def test_a_value_is_what_the_definition_says(place: tuple[int, int, int], lanes: int) -> None:
    def hashed(name: str) -> int:
        return int.from_bytes(hashlib.sha256(f"0/{name}".encode()).digest()[:8], "big")

    expert, row, column = place
    values = box((2, 3, lanes), place, "w")
    increment = hashed("increment of w") | 1
    for step in {0, 1, lanes // 3, lanes - 1}:
        z = hashed(f"w.{expert + 1}") + increment * ((row + 2) * 2**32 + (column + step) // 2)
        z %= 2**64
        z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ z >> 27) * 0x94D049BB133111EB % 2**64
        z ^= z >> 31
        a, b = (half - 2**32 * (half >> 31) for half in (z % 2**32, z >> 32))
        turn = math.sin if (column + step) % 2 else math.cos
        right = math.sqrt(-2 * math.log(max(abs(a), 0.5) / 2**31)) * turn(math.pi * b / 2**31)
        assert values[1, 2, step].item() == pytest.approx(right, rel=1e-5, abs=1e-6)


def test_any_box_holds_the_values_that_the_whole_has_there() -> None:
    whole = box((5, 70, 1100), (0, 0, 0))
    draw = torch.Generator().manual_seed(0)
    for _ in range(60):
        ends = [sorted(torch.randint(0, n + 1, (2,), generator=draw).tolist()) for n in whole.shape]
        here = tuple(slice(begin, end) for begin, end in ends)
        expected = whole[here]
        assert torch.equal(box(tuple(expected.shape), tuple(begin for begin, _ in ends)), expected)
    wide = box((3, 140_000), (7, 0), "wide")  # more columns than are computed at once
    assert torch.equal(box((1, 9000), (8, 129_001), "wide"), wide[1:2, 129_001:138_001])


def test_a_box_is_filled_wherever_it_is_stored() -> None:
    around = torch.full((4, 9, 50), torch.nan)
    NormalValues(1.0, seed=0).fill(around[1:3, ::2, 5:40:5], (0, 3, 1), "any")
    inside = torch.zeros_like(around, dtype=torch.bool)
    inside[1:3, ::2, 5:40:5] = True
    assert torch.equal(around[1:3, ::2, 5:40:5], box((2, 5, 7), (0, 3, 1)))
    assert around[~inside].isnan().all()


def test_buffers_start_at_zero() -> None:
    model = tiny_model(SMALL)
    assert all(buffer.any() for name, buffer in model.named_buffers() if name.endswith("bias"))
    for router in model.routers():
        router.load.fill_(3.0)
    initialize(model, 0)
    assert len(list(model.buffers())) == 4
    assert not any(buffer.any() for buffer in model.buffers())


def test_values_depend_on_the_seed_and_on_the_name() -> None:
    one, other = values(tiny_model(SMALL), seed=0), values(tiny_model(SMALL), seed=1)
    matrices = [name for name in one if "norm" not in name]
    assert not any(torch.equal(one[name], other[name]) for name in matrices)
    rows = [tuple(one[name].flatten()[:4].tolist()) for name in matrices]
    assert len(set(rows)) == len(matrices)


def test_values_do_not_depend_on_what_else_the_model_has() -> None:
    small = values(tiny_model(replace(SMALL, mtp_depths=0)))
    large = values(tiny_model(replace(SMALL, num_layers=4, mtp_depths=2)))
    assert set(small) < set(large)
    assert all(torch.equal(value, large[name]) for name, value in small.items())


def test_values_do_not_depend_on_the_order_of_the_modules() -> None:
    model = tiny_model(SMALL)
    expected = values(tiny_model(SMALL))
    model._modules = dict(reversed(model._modules.items()))
    found = values(model)
    assert list(found) != list(expected)
    assert all(torch.equal(value, expected[name]) for name, value in found.items())


def test_the_values_of_an_expert_do_not_depend_on_how_many_there_are() -> None:
    few = values(tiny_model(SMALL))
    many = values(tiny_model(replace(SMALL, moe=replace(MOE, num_experts=16))))
    for name in ("layers.1.ffn.experts.gate_up_proj", "mtp.0.block.ffn.experts.down_proj"):
        assert (len(few[name]), len(many[name])) == (8, 16)
        assert torch.equal(few[name], many[name][:8])
        assert len({tuple(expert.flatten()[:4].tolist()) for expert in many[name]}) == 16


def test_no_two_of_many_rows_are_equal() -> None:
    # torch.Generator keeps 32 bits of a seed: with one for each of these rows some 5 pairs would be equal.
    rows = torch.cat([box((2, 50_000, 2), (0, 0, 0), name).flatten(0, 1) for name in ("one", "other")])
    assert len(rows.unique(dim=0)) == len(rows)


def test_the_global_random_state_plays_no_part_and_is_left_alone() -> None:
    torch.manual_seed(1)
    first = box((3, 4), (0, 0))
    torch.manual_seed(2)
    state = torch.get_rng_state()
    assert torch.equal(box((3, 4), (0, 0)), first)
    assert torch.equal(torch.get_rng_state(), state)


def test_the_shard_of_every_parameter_is_asked_for_and_counted() -> None:
    model = tiny_model(SMALL)
    asked: list[int] = []
    counted: list[int] = []

    def lower_half(parameter: Tensor) -> Shard:
        asked.append(id(parameter))
        half = len(parameter) // 2
        return parameter[half:], (half,) + (0,) * (parameter.ndim - 1)

    expected = values(tiny_model(SMALL))
    for parameter in model.parameters():
        parameter.data.fill_(torch.nan)
    initialize(model, 0, lower_half, counted.append)
    assert sorted(asked) == sorted(map(id, model.parameters()))
    for name, parameter in model.named_parameters():
        half = len(parameter) // 2
        assert torch.equal(parameter[half:], expected[name][half:])
        assert parameter[:half].isnan().all()
    assert sum(counted) == sum(p[len(p) // 2 :].numel() for p in model.parameters())
