"""Block-wise FP8 training: gives the linear layers and the experts of a model products in FP8."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dsv3.config.precision import FP8Engine, Granularity
from dsv3.errors import UserError
from dsv3.fp8.all_gather import gather_in_fp8
from dsv3.fp8.ops import fp8_grouped_linear, fp8_linear
from dsv3.fp8.quantize import BLOCK
from dsv3.model.layers import Linear
from dsv3.model.moe import Experts
from dsv3.model.transformer import Transformer

HOPPER = (9, 0)

CUDA = (12, 9)

IN_HIGHER_PRECISION = ("head",)
"""Linear layers that keep the compute dtype; embedding, routers, norms and attention's core are none."""


@dataclass
class FP8Product:
    """What the products of a model's layers share; the probe counts broken tiles (operators.py)."""

    probe: Tensor
    engine: str
    tile: int
    power_of_two: bool
    gather: bool = False

    @property
    def options(self) -> tuple[Tensor, str, int, bool]:
        """The operators' last arguments."""
        return self.probe, self.engine, self.tile, self.power_of_two


class FP8Linear(FP8Product):
    """A model.layers.Product."""

    def __call__(self, x: Tensor, weight: Tensor) -> Tensor:
        """x W^T."""
        out: Tensor = fp8_linear(x.flatten(0, -2), weight, None, *self.options)
        return out.view(*x.shape[:-1], weight.shape[0])


class FP8Grouped(FP8Product):
    """A model.moe.GroupedProduct."""

    def __call__(self, rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
        """rows W_e^T."""
        return fp8_grouped_linear(rows, weight, None, ends, *self.options)  # type: ignore[no-any-return]


class BlockFP8:
    """Replaces the products of linear layers and experts; the fields are those of BlockFP8Config.

    `dispatch` is for whoever has put dispatchers between ranks (parallel/parallelizer.py).
    """

    def __init__(
        self,
        granularity: Granularity,
        power_of_two: bool,
        engine: FP8Engine,
        dispatch: bool = False,
        gather: bool = False,
    ) -> None:
        self.tile = BLOCK if granularity is Granularity.tile else 0
        self.power_of_two = power_of_two
        self.engine = engine
        self.dispatch = dispatch
        self.gather = gather

    def __call__(self, model: Transformer, device: torch.device, counts: bool = True) -> None:
        """Set the products of `model`, which will be on `device`, and whether they count broken tiles.

        UserError where an engine cannot run.
        """
        engine = choose_engine(self.engine, device, self.tile)
        probe = torch.zeros((), device=device, requires_grad=counts)
        options = (probe, engine.name, self.tile, self.power_of_two, self.gather)
        for name, module in model.named_modules():
            if isinstance(module, Linear) and name not in IN_HIGHER_PRECISION:
                module.product = FP8Linear(*options)
            elif isinstance(module, Experts):
                module.product = FP8Grouped(*options)


def gather_weights(model: nn.Module) -> None:
    """Let FSDP gather the weights of FP8 products in FP8 where that is chosen; once they have memory."""
    for module in model.modules():
        product = _product(module)
        if product is not None and product.gather:
            for weight in module.parameters(recurse=False):
                gather_in_fp8(weight, product.power_of_two)


def choose_engine(chosen: FP8Engine, device: torch.device, tile: int = BLOCK) -> FP8Engine:
    """The engine for `device`; UserError where the chosen one, or any fast one on a GPU, is missing."""
    if chosen is FP8Engine.emulated or (chosen is FP8Engine.auto and device.type == "cpu"):
        return FP8Engine.emulated
    lacking = _lacking(device, tile)
    if lacking:
        raise UserError(
            f"precision.fp8.engine={chosen.name}: scaled_mm {lacking}; take precision=bf16, or "
            "precision.fp8.engine=emulated, which computes the same and is slow"
        )
    return FP8Engine.scaled_mm


def _lacking(device: torch.device, tile: int) -> str | None:
    if device.type != "cuda":
        return f"needs a CUDA GPU, and the device is {device.type}"
    if tile != BLOCK:
        return "multiplies tiles, and precision.fp8.granularity=tensor here"
    capability, version = torch.cuda.get_device_capability(device), torch.version.cuda
    if capability != HOPPER:
        found = ".".join(map(str, capability))
        return f"has block-wise scales on compute capability 9.0 (Hopper) alone, and this GPU's is {found}"
    if version is None or tuple(int(n) for n in version.split(".")[:2]) < CUDA:
        return f"needs a PyTorch built for CUDA 12.9 or later, and this one is for {version or 'none'}"
    return None


def engine_of(parts: Iterable[nn.Module]) -> str | None:
    """What multiplies the layers of `parts` in FP8, a name of engine.ENGINES; None where nothing does."""
    found = (_product(module) for part in parts for module in part.modules())
    return next((product.engine for product in found if product is not None), None)


def take_broken_tiles(parts: Iterable[nn.Module], device: torch.device) -> Tensor:
    """How many tiles of backward operands were not finite since the last call; an fp32 scalar.

    NaN where that is unknown: without a backward pass, and where products do not count.
    """
    counts = [probe.grad for probe in _probes(parts) if probe.grad is not None]
    for probe in _probes(parts):
        probe.grad = None
    return torch.stack(counts).sum() if counts else torch.full((), torch.nan, device=device)


def _probes(parts: Iterable[nn.Module]) -> list[Tensor]:
    """Each part's probe; its layers share it."""
    products = (_product(module) for part in parts for module in part.modules())
    return list({id(p.probe): p.probe for p in products if p is not None}.values())


def _product(module: nn.Module) -> FP8Product | None:
    product = getattr(module, "product", None)
    return product if isinstance(product, FP8Product) else None
