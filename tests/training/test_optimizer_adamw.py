"""AdamW with bf16 moments: PyTorch's arithmetic in fp32, where only the stored moments are rounded."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw as functional

from dsv3.checkpoint.state import make_optimizer_state
from dsv3.config.optimizer import SLOWEST_BF16_BETA, AdamWConfig, OptimizerConfig
from dsv3.config.precision import MomentType
from dsv3.errors import InvalidValue
from dsv3.training import optimizer as optimizer_module
from dsv3.training.optimizer import MOMENTS, BF16MomentAdamW, build_optimizer
from tests.reference import tiny_model

SHAPES = ((7, 33), (5,), (3, 4, 16), ())
NUMBERS: dict[str, Any] = {"lr": 0.02, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.3}


def parameters(seed: int = 0) -> list[nn.Parameter]:
    """Return parameters of 0 to 3 dims, the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]


def gradients(steps: int) -> Iterator[list[Tensor]]:
    """Yield gradients of very different magnitudes, one list per step."""
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        yield [
            torch.randn(shape, generator=generator) * 10 ** torch.randn(shape, generator=generator)
            for shape in SHAPES
        ]


def take(optimizer: torch.optim.Optimizer, moved: list[nn.Parameter], steps: int, skip: int = 0) -> None:
    for given in list(gradients(steps))[skip:]:
        for parameter, gradient in zip(moved, given, strict=True):
            parameter.grad = gradient.clone()
        optimizer.step()


def rounded(exact: Tensor) -> Tensor:
    """Round fp32 values to bf16's 8 significant bits, to nearest and ties to even, by their bits."""
    bits = exact.contiguous().view(torch.int32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) & ~0xFFFF).view(torch.float32)


def states(optimizer: torch.optim.Optimizer) -> list[dict[str, Tensor]]:
    return [optimizer.state[p] for group in optimizer.param_groups for p in group["params"]]


@pytest.mark.parametrize("fused", [True, False])
def test_it_is_torchs_adamw_whose_moments_are_rounded_after_every_step(fused: bool) -> None:
    mine, theirs = parameters(), parameters()
    optimizer = BF16MomentAdamW(mine, **NUMBERS, fused=fused)
    reference = torch.optim.AdamW(theirs, **NUMBERS, fused=fused)
    for number, given in enumerate(gradients(6)):
        for chosen in (optimizer, reference):
            chosen.param_groups[0]["lr"] = 0.02 / (1 + number)
        for a, b, gradient in zip(mine, theirs, given, strict=True):
            a.grad, b.grad = gradient.clone(), gradient.clone()
        optimizer.step()
        reference.step()
        for state in states(reference):
            for key in MOMENTS:
                state[key] = rounded(state[key])
        assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))
        for ours, right in zip(states(optimizer), states(reference), strict=True):
            assert ours["step"] == right["step"] == number + 1
            for key in MOMENTS:
                assert ours[key].dtype is torch.bfloat16
                assert torch.equal(ours[key].float(), right[key])


def test_it_is_the_papers_formula() -> None:
    """In float64: what fp32 loses may turn the rounding of a moment here and there, by a bit of bf16."""
    mine = parameters()
    optimizer = BF16MomentAdamW(mine, **NUMBERS)
    wanted = [p.detach().double() for p in mine]
    first, second = ([torch.zeros_like(p) for p in wanted] for _ in MOMENTS)
    take(optimizer, mine, 4)
    for t, given in enumerate(gradients(4), start=1):
        for i, gradient in enumerate(g.double() for g in given):
            m, v = 0.8 * first[i] + 0.2 * gradient, 0.95 * second[i] + 0.05 * gradient**2
            wanted[i] -= 0.02 * 0.3 * wanted[i]
            wanted[i] -= 0.02 * (m / (1 - 0.8**t)) / ((v / (1 - 0.95**t)).sqrt() + 1e-6)
            first[i], second[i] = rounded(m.float()).double(), rounded(v.float()).double()
    for i, state in enumerate(states(optimizer)):
        assert torch.allclose(mine[i].double(), wanted[i], rtol=1e-5, atol=1e-6)
        for key, right in (("exp_avg", first[i]), ("exp_avg_sq", second[i])):
            assert torch.allclose(state[key].double(), right, rtol=2**-7, atol=0)
            assert (state[key].double() == right).float().mean() > 0.98


def test_fp32_masters_gather_updates_that_bf16_ones_would_not_see() -> None:
    assert torch.ones(1, dtype=torch.bfloat16).add(1e-5) == 1
    master = nn.Parameter(torch.ones(64))
    optimizer = BF16MomentAdamW([master], lr=1e-5, weight_decay=0.0)
    for _ in range(100):
        master.grad = torch.full((64,), -0.5)
        optimizer.step()
    # Adam's update is lr where the gradient stays as it is; a moment may be off by half a bit of bf16.
    assert torch.allclose(master.detach(), torch.tensor(1 + 100 * 1e-5), rtol=0, atol=5e-5)


@pytest.mark.parametrize(("chunk", "calls"), [(2**22, 1), (64, 6 + 1 + 3 + 1), (1, 7 + 5 + 3 + 1)])
def test_a_chunk_bounds_the_elements_that_are_in_fp32_at_once(
    monkeypatch: pytest.MonkeyPatch, chunk: int, calls: int
) -> None:
    together: list[int] = []

    def counted(moved: list[Tensor], grads: list[Tensor], *rest: Any, **options: Any) -> None:
        together.append(sum(p.numel() for p in moved))
        functional(moved, grads, *rest, **options)

    monkeypatch.setattr(optimizer_module, "adamw", counted)
    whole, parts = parameters(), parameters()
    take(BF16MomentAdamW(whole, **NUMBERS, fused=False), whole, 3)
    together.clear()
    monkeypatch.setattr(optimizer_module, "CHUNK_ELEMENTS", {"cpu": chunk})
    optimizer = BF16MomentAdamW(parts, **NUMBERS, fused=False)
    take(optimizer, parts, 3)
    assert len(together) == 3 * calls
    # A row of the stack is 64 numbers and the widest.
    assert max(together) <= max(chunk, 64)
    assert sum(together) == 3 * sum(p.numel() for p in parts)
    assert [state["step"].item() for state in states(optimizer)] == [3] * len(SHAPES)
    for a, b in zip(whole, parts, strict=True):
        assert torch.allclose(a, b, rtol=1e-6, atol=0)


def test_parameters_without_a_gradient_or_a_number_are_left_alone() -> None:
    still, empty, moved = (nn.Parameter(torch.ones(n)) for n in (3, 0, 3))
    optimizer = BF16MomentAdamW([{"params": [still]}, {"params": [empty, moved]}])
    empty.grad, moved.grad = torch.ones(0), torch.ones(3)
    optimizer.step()
    assert still.eq(1).all()
    assert still not in optimizer.state
    assert moved.ne(1).all()


def test_a_loaded_state_is_bf16_again_and_goes_on_bit_for_bit() -> None:
    straight, stopped = parameters(), parameters()
    take(BF16MomentAdamW(straight, **NUMBERS), straight, 5)
    optimizer = BF16MomentAdamW(stopped, **NUMBERS)
    take(optimizer, stopped, 2)
    resumed = BF16MomentAdamW(stopped, lr=9.0)
    resumed.load_state_dict(optimizer.state_dict())
    for ours, stored in zip(states(resumed), states(optimizer), strict=True):
        for key in MOMENTS:
            assert ours[key].dtype is torch.bfloat16
            assert ours[key].equal(stored[key])
            assert ours[key].any()
    take(resumed, stopped, 5, skip=2)
    assert all(torch.equal(a, b) for a, b in zip(straight, stopped, strict=True))


def test_a_state_made_for_loading_is_zero_and_moves_nothing() -> None:
    made = parameters()
    optimizer = BF16MomentAdamW(made, **NUMBERS)
    make_optimizer_state(optimizer)
    assert all(torch.equal(a, b) for a, b in zip(made, parameters(), strict=True))
    for state in states(optimizer):
        assert {key: value.dtype for key, value in state.items()} == {
            "step": torch.float32, "exp_avg": torch.bfloat16, "exp_avg_sq": torch.bfloat16
        }  # fmt: skip
        assert not any(state[key].any() for key in MOMENTS)


def test_the_precision_chooses_it_with_the_numbers_of_the_config() -> None:
    config = AdamWConfig(lr=0.02, betas=(0.8, 0.7), eps=1e-3, weight_decay=0.3, fused=False)
    model = tiny_model()
    optimizer = build_optimizer(config, [model], MomentType.bf16)
    assert type(optimizer) is BF16MomentAdamW
    for group, decay in zip(optimizer.param_groups, (0.3, 0.0), strict=True):
        assert (group["lr"], tuple(group["betas"]), group["eps"]) == (0.02, (0.8, 0.7), 1e-3)
        assert (group["weight_decay"], group["fused"]) == (decay, False)
    assert type(build_optimizer(config, [model], MomentType.fp32)) is torch.optim.AdamW


@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.9, 0.9962), (0.997, 0.95)])
def test_means_too_slow_for_bf16_are_refused(betas: tuple[float, float]) -> None:
    config = AdamWConfig(betas=betas)
    with pytest.raises(InvalidValue, match=r"at most 0\.99609375 each") as error:
        build_optimizer(config, [tiny_model()], MomentType.bf16)
    assert (error.value.key, error.value.value) == ("optimizer.betas", list(betas))
    build_optimizer(config, [tiny_model()], MomentType.fp32)
    build_optimizer(AdamWConfig(betas=(0.9, SLOWEST_BF16_BETA)), [tiny_model()], MomentType.bf16)


@pytest.mark.parametrize(("beta", "falls"), [(SLOWEST_BF16_BETA, 128), (0.9962, 125), (0.999, 0)])
def test_the_slowest_mean_allowed_is_the_slowest_that_always_falls(beta: float, falls: int) -> None:
    """Under gradients of zero, from each of the 128 numbers that bf16 has between 1 and 2."""
    still = nn.Parameter(torch.zeros(128))
    optimizer = BF16MomentAdamW([still], betas=(0.9, beta))
    make_optimizer_state(optimizer)
    start = (1 + torch.arange(128) / 128).bfloat16()
    optimizer.state[still]["exp_avg_sq"].copy_(start)
    still.grad = torch.zeros(128)
    optimizer.step()
    assert (optimizer.state[still]["exp_avg_sq"] < start).sum() == falls


@pytest.mark.parametrize("target", ["torch.optim.SGD", "torch.optim.Adam"])
def test_other_optimizers_have_no_bf16_moments(target: str) -> None:
    config: OptimizerConfig = AdamWConfig(_target_=target)
    with pytest.raises(InvalidValue, match=f"only AdamW has them, and optimizer._target_={target}"):
        build_optimizer(config, [tiny_model()], MomentType.bf16)
