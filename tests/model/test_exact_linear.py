"""The router's matmul is exact fp32, whatever TF32 and autocast allow elsewhere; MFU by what computes."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dsv3.config.hardware import HardwareConfig
from dsv3.config.precision import BlockFP8Config, ComputeType, MatmulPrecision, PrecisionConfig
from dsv3.model.exact_linear import exact_linear
from tests.reference import normal, tiny_model, tokens


@pytest.fixture
def tf32() -> object:
    """Let this process use TF32, as precision.matmul=high does on a GPU."""
    torch.set_float32_matmul_precision("high")
    yield
    torch.set_float32_matmul_precision("highest")


def matmuls_of_experts(monkeypatch: pytest.MonkeyPatch, experts: int) -> list[str]:
    """Record under which precision the matmuls of the router's weight run, forward and backward."""
    real, seen = F.linear, list[str]()

    def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        assert not torch.is_autocast_enabled("cpu")
        if experts in (*x.shape, *weight.shape):
            seen.append(torch.get_float32_matmul_precision())
        return real(x, weight, bias)

    monkeypatch.setattr("dsv3.model.exact_linear.F.linear", linear)
    return seen


def test_it_is_a_linear_map_with_its_gradients() -> None:
    x, weight = normal(2, 5, 7, seed=1), normal(3, 7, seed=2)
    torch.library.opcheck(exact_linear, (x, weight))
    gradient = normal(2, 5, 3, seed=3)
    found = torch.autograd.grad(exact_linear(x, weight), (x, weight), gradient)
    right = torch.autograd.grad(F.linear(x, weight), (x, weight), gradient)
    assert torch.equal(exact_linear(x, weight), F.linear(x, weight))
    assert all(torch.allclose(a, b, rtol=1e-6, atol=1e-6) for a, b in zip(found, right, strict=True))


def test_the_routers_matmuls_are_exact_where_the_process_allows_tf32(
    monkeypatch: pytest.MonkeyPatch, tf32: object
) -> None:
    model = tiny_model()
    routers = len(model.routers())
    seen = matmuls_of_experts(monkeypatch, model.config.moe.num_experts)
    logits = model(tokens(1, 5)).logits
    assert seen == ["highest"] * routers
    logits.sum().backward()
    assert len(seen) >= 2 * routers
    assert set(seen) == {"highest"}
    assert torch.get_float32_matmul_precision() == "high"


def test_the_setting_comes_back_where_a_matmul_fails(tf32: object) -> None:
    with pytest.raises(RuntimeError):
        exact_linear(torch.ones(2, 3), torch.ones(2, 4))
    assert torch.get_float32_matmul_precision() == "high"


def test_autocast_leaves_it_in_fp32() -> None:
    x, weight = normal(4, 7, seed=1).detach(), normal(3, 7, seed=2).detach()
    with torch.autocast("cpu", torch.bfloat16):
        found = exact_linear(x, weight)
    assert torch.equal(found, F.linear(x, weight))


@pytest.mark.parametrize(
    ("precision", "engine", "kind"),
    [
        (PrecisionConfig(ComputeType.fp32), None, "fp32"),
        (PrecisionConfig(ComputeType.fp32, matmul=MatmulPrecision.high), None, "tf32"),
        (PrecisionConfig(ComputeType.bf16, matmul=MatmulPrecision.high), None, "bf16"),
        (PrecisionConfig(ComputeType.bf16, fp8=BlockFP8Config()), "scaled_mm", "fp8"),
        (PrecisionConfig(ComputeType.bf16, fp8=BlockFP8Config()), "emulated", "bf16"),
    ],
)
def test_mfu_is_a_share_of_the_peak_of_what_computes(
    precision: PrecisionConfig, engine: str | None, kind: str
) -> None:
    assert precision.matmul_type(engine) == kind
    assert hasattr(HardwareConfig(name="h100"), f"peak_flops_{kind}")
