"""Initial weights: their distribution, and what their values depend on."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from dsv3.model.initialization import initial_value, initialize
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


def test_initial_values_are_normal() -> None:
    value = initial_value("any", torch.Size([512, 512]), 0.006, 0) / 0.006
    assert value.std().item() == pytest.approx(1, abs=0.01)
    assert value.mean().item() == pytest.approx(0, abs=0.01)
    for sigmas, share in ((1, 0.6827), (2, 0.9545), (3, 0.9973)):
        assert (value.abs() < sigmas).float().mean().item() == pytest.approx(share, abs=0.004)


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


def test_the_global_random_state_plays_no_part_and_is_left_alone() -> None:
    torch.manual_seed(1)
    first = initial_value("x", torch.Size([3, 4]), 1.0, 0)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    assert torch.equal(initial_value("x", torch.Size([3, 4]), 1.0, 0), first)
    assert torch.equal(torch.get_rng_state(), state)


def test_every_parameter_is_handed_to_write_once_as_a_full_value() -> None:
    model, written = tiny_model(SMALL), []

    def write(parameter: Tensor, value: Tensor) -> None:
        assert parameter.shape == value.shape
        assert value.dtype == torch.float32
        written.append(id(parameter))

    initialize(model, 0, write)
    assert sorted(written) == sorted(map(id, model.parameters()))
