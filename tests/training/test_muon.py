"""Muon equals torch.optim.Muon on each matrix of the model, and AdamW on everything else."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dsv3.config.optimizer import MuonConfig, UpdateScale
from dsv3.config.precision import ComputeType
from dsv3.training import muon
from dsv3.training.muon import Muon, orthogonalize
from dsv3.training.optimizer import build_optimizer
from tests.reference import tiny_model

NUMBERS: dict[str, Any] = {"lr": 0.02, "momentum": 0.9, "weight_decay": 0.3, "ns_steps": 4}
SHAPES = [(6, 10), (10, 6), (7, 7), (1, 5)]


def gradients(shape: tuple[int, ...], steps: int = 3) -> list[Tensor]:
    draw = torch.Generator().manual_seed(3)
    return [torch.randn(shape, generator=draw) for _ in range(steps)]


def trained(kind: Any, start: Tensor, steps: list[Tensor], **settings: Any) -> Tensor:
    """Return what an optimizer makes of a parameter."""
    parameter = nn.Parameter(start.clone())
    optimizer = kind([{"params": [parameter], **settings.pop("group", {})}], **settings)
    for gradient in steps:
        parameter.grad = gradient.clone()
        optimizer.step()
    return parameter.detach()


def by_torch(start: Tensor, steps: list[Tensor], scale: UpdateScale, **numbers: Any) -> Tensor:
    """Return the same of torch.optim.Muon, which computes in bf16."""
    return trained(torch.optim.Muon, start, steps, adjust_lr_fn=scale.value, **numbers)


@pytest.mark.parametrize("scale", UpdateScale)
@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_matrix_moves_as_under_torchs_muon(
    shape: tuple[int, int], nesterov: bool, scale: UpdateScale
) -> None:
    start, steps = torch.randn(shape, generator=torch.Generator().manual_seed(1)), gradients(shape)
    numbers = {**NUMBERS, "nesterov": nesterov}
    expected = by_torch(start, steps, scale, **numbers)
    settings = {**numbers, "update_scale": scale, "ns_dtype": ComputeType.bf16, "group": {"hidden": True}}
    moved = trained(Muon, start, steps, **settings)
    assert (moved - expected).norm() < 0.01 * (expected - start).norm()
    exact = trained(
        Muon, start, steps, **settings | {"ns_dtype": ComputeType.fp32, "group": {"hidden": True}}
    )
    assert 0 < (exact - expected).norm() < 0.05 * (expected - start).norm()


@pytest.mark.parametrize("chunk", [1, 2**26])
def test_experts_move_as_a_loop_over_experts_and_fused_projections_apart(
    chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(muon, "CHUNK_ELEMENTS", chunk)
    start, steps = torch.randn(3, 8, 6, generator=torch.Generator().manual_seed(1)), gradients((3, 8, 6))
    group = {"hidden": True, "fused_matrices": 2}
    moved = trained(Muon, start, steps, **NUMBERS, ns_dtype=ComputeType.bf16, group=group)
    for expert in range(3):
        for rows in (slice(0, 4), slice(4, 8)):
            parts = [step[expert, rows] for step in steps]
            expected = by_torch(start[expert, rows], parts, UpdateScale.match_rms_adamw, **NUMBERS)
            difference = (moved[expert, rows] - expected).norm()
            assert difference < 0.01 * (expected - start[expert, rows]).norm()


def test_an_update_has_singular_values_of_about_one_and_the_size_of_adamws() -> None:
    stack = torch.randn(2, 40, 24, generator=torch.Generator().manual_seed(1))
    config = MuonConfig()
    update = orthogonalize(stack, config.ns_coefficients, config.ns_steps, config.ns_eps)
    values = torch.linalg.svdvals(update)
    assert 0.6 < values.min() < values.max() < 1.3
    scaled = 0.2 * 40**0.5 * update
    assert scaled.square().mean().sqrt() == pytest.approx(0.2, rel=0.2)
    assert torch.isfinite(orthogonalize(torch.zeros(1, 3, 4), config.ns_coefficients, 5, 1e-7)).all()


def test_of_a_model_hidden_matrices_take_muon_and_the_rest_adamw() -> None:
    model, other = tiny_model(), tiny_model()
    config = MuonConfig(lr=0.01, weight_decay=0.2, adamw_lr_scale=0.5, adamw_betas=(0.8, 0.9), adamw_eps=1e-6)
    optimizer = build_optimizer(config, [model])
    adamw = torch.optim.AdamW(other.parameters(), lr=0.005, betas=(0.8, 0.9), eps=1e-6, weight_decay=0.2)
    draw = torch.Generator().manual_seed(5)
    for _ in range(2):
        for ours, theirs in zip(model.parameters(), other.parameters(), strict=True):
            ours.grad = torch.randn(ours.shape, generator=draw)
            theirs.grad = ours.grad.clone()
        optimizer.step()
        adamw.step()
    states = {name: set(optimizer.state[parameter]) for name, parameter in model.named_parameters()}
    rest = {name for name, state in states.items() if state == {"step", "exp_avg", "exp_avg_sq"}}
    assert {name for name, state in states.items() if state == {"momentum_buffer"}} == set(states) - rest
    assert {name.split(".")[-2] for name in rest if "norm" not in name} == {"embedding", "head", "router"}
    assert all(name in rest for name in states if "norm" in name)
    plain = dict(other.named_parameters())
    for name, parameter in model.named_parameters():
        if name in rest and "norm" not in name:  # norms decay under the plain AdamW
            assert torch.equal(parameter, plain[name]), name
