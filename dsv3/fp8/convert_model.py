"""Block-wise FP8 training: replaces the matmuls of a model's linear layers and experts by FP8 matmuls."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dsv3.config.precision import FP8Engine, Granularity
from dsv3.errors import UserError
from dsv3.fp8.all_gather import all_gather_in_fp8
from dsv3.fp8.ops import fp8_grouped_linear, fp8_linear
from dsv3.fp8.quantize import BLOCK
from dsv3.model.layers import Linear
from dsv3.model.moe import Experts
from dsv3.model.transformer import Transformer

HOPPER_CAPABILITY = (9, 0)

MIN_CUDA = (12, 9)


@dataclass
class FP8Matmul:
    """The settings of a layer's FP8 matmul; the layers of a model share one `probe`.

    Attributes:
        probe: a scalar whose gradient counts tiles that are not finite (see ops.py).
        engine: a name of matmul.MATMUL_ENGINES.
        tile: values per scale along a tile; 0 for one scale per tensor.
        power_of_two: whether scales are powers of two.
        gather: whether FSDP all-gathers the weight in FP8.
    """

    probe: Tensor
    engine: str
    tile: int
    power_of_two: bool
    gather: bool = False

    @property
    def options(self) -> tuple[Tensor, str, int, bool]:
        """Return the last arguments of the FP8 operators."""
        return self.probe, self.engine, self.tile, self.power_of_two


class FP8Linear(FP8Matmul):
    """The matmul of a Linear in FP8 (a model.layers.Matmul)."""

    def __call__(self, x: Tensor, weight: Tensor) -> Tensor:
        """Return x W^T [.., out] for `x` [.., in] and `weight` [out, in]."""
        out: Tensor = fp8_linear(x.flatten(0, -2), weight, None, *self.options)
        return out.view(*x.shape[:-1], weight.shape[0])


class FP8GroupedLinear(FP8Matmul):
    """The grouped matmul of Experts in FP8 (a model.moe.GroupedMatmul).

    Each expert's rows are quantized and multiplied by calls of their own, so the host must know where they
    end.
    """

    ends_on_host = True

    def __call__(self, rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
        """Return rows W_e^T [rows, out], see ops.fp8_grouped_linear."""
        return fp8_grouped_linear(rows, weight, None, ends, *self.options)  # type: ignore[no-any-return]


class BlockFP8:
    """Replace the matmuls of linear layers and experts; the fields are those of BlockFP8Config.

    `dispatch` is read by the parallel wrappers, which let token dispatch travel in FP8.
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
        """Set the matmuls of `model`, which will run on `device`.

        With `counts` they count the tiles that are not finite. Raises UserError where the engine cannot run.
        """
        engine = choose_engine(self.engine, device, self.tile)
        probe = torch.zeros((), device=device, requires_grad=counts)
        options = (probe, engine.name, self.tile, self.power_of_two, self.gather)
        for module in model.modules():
            # Head, embedding, routers, norms and attention core are not Linear: they keep their precision.
            if isinstance(module, Linear):
                module.matmul = FP8Linear(*options)
            elif isinstance(module, Experts):
                module.matmul = FP8GroupedLinear(*options)


def enable_fp8_all_gather(model: nn.Module) -> None:
    """Let FSDP all-gather the weights of FP8 matmuls in FP8, where that is chosen; call it after to_empty."""
    for module in model.modules():
        matmul = _fp8_matmul(module)
        if matmul is not None and matmul.gather:
            for weight in module.parameters(recurse=False):
                all_gather_in_fp8(weight, matmul.power_of_two)


def choose_engine(chosen: FP8Engine, device: torch.device, tile: int = BLOCK) -> FP8Engine:
    """Return the engine for `device`: scaled_mm on Hopper, else the emulation, unless `chosen` names one.

    Raises:
        UserError: scaled_mm is chosen, or this is a Hopper GPU, and it cannot run here.
    """
    if chosen is FP8Engine.emulated or (chosen is FP8Engine.auto and not _is_hopper(device)):
        return FP8Engine.emulated
    obstacle = _scaled_mm_obstacle(device, tile)
    if obstacle:
        raise UserError(
            f"precision.fp8.engine={chosen.name}: scaled_mm {obstacle}; take precision=bf16, or "
            "precision.fp8.engine=emulated, which computes the same and is slow"
        )
    return FP8Engine.scaled_mm


def _is_hopper(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) == HOPPER_CAPABILITY


def _scaled_mm_obstacle(device: torch.device, tile: int) -> str | None:
    """Return the reason why scaled_mm cannot run, None where it can."""
    if device.type != "cuda":
        return f"needs a CUDA GPU, and the device is {device.type}"
    if tile != BLOCK:
        return "multiplies tiles, and precision.fp8.granularity=tensor here"
    version = torch.version.cuda
    if not _is_hopper(device):
        found = ".".join(map(str, torch.cuda.get_device_capability(device)))
        return f"has block-wise scales only on compute capability 9.0 (Hopper), and this GPU has {found}"
    if version is None or tuple(int(n) for n in version.split(".")[:2]) < MIN_CUDA:
        return f"needs a PyTorch built for CUDA 12.9 or later, and this one is for {version or 'none'}"
    return None


def fp8_engine_name(parts: Iterable[nn.Module]) -> str | None:
    """Return the name of the engine that the layers of `parts` use; None where no layer computes in FP8."""
    found = (_fp8_matmul(module) for part in parts for module in part.modules())
    return next((matmul.engine for matmul in found if matmul is not None), None)


def take_nonfinite_tiles(parts: Iterable[nn.Module], device: torch.device) -> Tensor:
    """Return the number of tiles of backward operands that were not finite since the last call, and reset it.

    The result is an fp32 scalar. It is NaN where the number is unknown: without a backward pass, and where
    the matmuls do not count.
    """
    matmuls = (_fp8_matmul(module) for part in parts for module in part.modules())
    probes = {id(matmul.probe): matmul.probe for matmul in matmuls if matmul is not None}.values()
    counts = [probe.grad for probe in probes if probe.grad is not None]
    for probe in probes:
        probe.grad = None
    return torch.stack(counts).sum() if counts else torch.full((), torch.nan, device=device)


def _fp8_matmul(module: nn.Module) -> FP8Matmul | None:
    matmul = getattr(module, "matmul", None)
    return matmul if isinstance(matmul, FP8Matmul) else None
