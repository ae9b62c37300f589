"""The layers of a model that compute in FP8, and the choice of the engine."""

from typing import Any

import pytest
import torch
from torch import nn

from dsv3.config.precision import FP8Engine, Granularity
from dsv3.errors import UserError
from dsv3.fp8.convert_model import BlockFP8, FP8Matmul, choose_engine, fp8_engine_name, take_nonfinite_tiles
from dsv3.model.layers import Linear
from dsv3.model.moe import Experts
from dsv3.model.transformer import Transformer
from tests.harness.operators import Operators
from tests.reference import tiny_model, tokens

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def fp8_model(granularity: Granularity = Granularity.tile, power_of_two: bool = False) -> Transformer:
    model = tiny_model(dtype=torch.bfloat16)
    BlockFP8(granularity, power_of_two, FP8Engine.auto, dispatch=False)(model, CPU)
    return model


def fp8_matmul_of(module: nn.Module) -> FP8Matmul | None:
    """Return the FP8 matmul of a layer that has one."""
    product = getattr(module, "matmul", None)
    return product if isinstance(product, FP8Matmul) else None


class Products(Operators):
    """Keep the widths of plain matmuls too."""

    def __init__(self) -> None:
        super().__init__()
        self.plain: list[tuple[int, ...]] = []

    def saw(self, name: str, args: Any, result: Any) -> None:
        if name in ("mm", "addmm", "_grouped_mm"):
            self.plain.append(tuple(args[-1].shape))


def test_all_linear_layers_but_the_head_and_all_experts_multiply_in_fp8() -> None:
    model = fp8_model()
    found = {name for name, module in model.named_modules() if fp8_matmul_of(module)}
    expected = {name for name, module in model.named_modules() if isinstance(module, Linear | Experts)}
    assert found == expected
    assert "head" not in found
    # Every kind by name, for a type that is not Linear would be left out without a word.
    kinds = {name.split(".")[-1] for name in found}
    attention = {"q_a_proj", "q_b_proj", "kv_a_proj", "kv_b_proj", "o_proj"}
    assert kinds - attention == {"gate_proj", "up_proj", "down_proj", "experts", "projection"}
    assert len(kinds & attention) == 5


def test_a_pass_multiplies_nothing_else_but_head_router_and_attention() -> None:
    model = fp8_model()
    linear = sum(isinstance(module, Linear) for module in model.modules())
    experts = sum(isinstance(module, Experts) for module in model.modules())
    with Products() as calls:
        output = model(tokens(2, 16))
    assert calls.names["fp8_linear"] == linear
    assert calls.names["fp8_grouped_linear"] == 2 * experts
    assert calls.names["exact_linear"] == len(model.routers())
    heads = [model.head.weight.T.shape] * 2  # the main model's and that of one MTP depth
    assert sorted(calls.plain) == sorted(map(tuple, heads))
    (output.logits.sum() + sum(logits.sum() for logits in output.mtp_logits)).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_the_recipe_reaches_the_layers() -> None:
    for granularity, tile in ((Granularity.tile, 128), (Granularity.tensor, 0)):
        model = fp8_model(granularity, power_of_two=True)
        for product in filter(None, map(fp8_matmul_of, model.modules())):
            assert (product.engine, product.tile, product.power_of_two) == ("emulated", tile, True)


def test_broken_tiles_are_taken_once() -> None:
    model = fp8_model()
    assert fp8_engine_name([model]) == "emulated"
    assert fp8_engine_name([tiny_model()]) is None
    for _ in range(2):
        # Without a backward pass there is nothing to know.
        assert take_nonfinite_tiles([model], CPU).isnan()
        logits = model(tokens(2, 16)).logits
        logits.backward(torch.full_like(logits, torch.nan))
        assert float(take_nonfinite_tiles([model], CPU)) > 0
    model(tokens(2, 16)).logits.sum().backward()
    assert float(take_nonfinite_tiles([model, model], CPU)) == 0.0


def hopper(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int] = (9, 0), cuda: str | None = "12.9"
) -> None:
    """Pretend that this machine has such a GPU and PyTorch was built for such a CUDA."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.version, "cuda", cuda)


@pytest.mark.parametrize("cuda", ["12.9", "13.0"])
@pytest.mark.parametrize("chosen", [FP8Engine.auto, FP8Engine.scaled_mm])
def test_hopper_takes_scaled_mm(chosen: FP8Engine, cuda: str, monkeypatch: pytest.MonkeyPatch) -> None:
    hopper(monkeypatch, cuda=cuda)
    assert choose_engine(chosen, GPU) is FP8Engine.scaled_mm
    assert choose_engine(FP8Engine.emulated, GPU) is FP8Engine.emulated


def test_cpu_takes_the_emulated_engine() -> None:
    assert choose_engine(FP8Engine.auto, CPU) is FP8Engine.emulated
    assert choose_engine(FP8Engine.auto, CPU, tile=0) is FP8Engine.emulated
    with pytest.raises(
        UserError,
        match=r"precision\.fp8\.engine=scaled_mm: scaled_mm needs a CUDA GPU, and the device is cpu",
    ):
        choose_engine(FP8Engine.scaled_mm, CPU)


OBSTACLES = [
    ((8, 0), "12.9", 128, r"only on compute capability 9\.0 \(Hopper\), and this GPU has 8\.0"),
    ((10, 0), "12.9", 128, r"this GPU has 10\.0"),
    ((9, 0), "12.8", 128, r"built for CUDA 12\.9 or later, and this one is for 12\.8"),
    ((9, 0), "11.10", 128, r"this one is for 11\.10"),
    ((9, 0), None, 128, r"this one is for none"),
    ((9, 0), "12.9", 0, r"multiplies tiles, and precision\.fp8\.granularity=tensor here"),
]


@pytest.mark.parametrize("chosen", [FP8Engine.auto, FP8Engine.scaled_mm])
@pytest.mark.parametrize(("capability", "cuda", "tile", "said"), OBSTACLES)
def test_hopper_is_told_why_the_fast_engine_cannot_run_and_other_gpus_emulate(
    chosen: FP8Engine,
    capability: tuple[int, int],
    cuda: str | None,
    tile: int,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    hopper(monkeypatch, capability, cuda)
    assert choose_engine(FP8Engine.emulated, GPU, tile) is FP8Engine.emulated
    if chosen is FP8Engine.auto and capability != (9, 0):
        assert choose_engine(chosen, GPU, tile) is FP8Engine.emulated
        return
    with pytest.raises(
        UserError, match=rf"precision\.fp8\.engine={chosen.name}: .*{said}; take precision=bf16"
    ):
        choose_engine(chosen, GPU, tile)
