"""What precision.fp8 needs, asked before any process starts; imports no torch."""

from typing import TYPE_CHECKING

from dsv3.planning.plan import Plan
from dsv3.precision.config import FP8Engine, Granularity
from dsv3.runtime.errors import UserError

if TYPE_CHECKING:
    from dsv3.config import Config

HOPPER = ("h100", "h200", "h800")
"""Hardware that has block-wise scales in its tensor cores, as cuBLAS uses them."""
_OTHERWISE = "take precision=bf16, or precision.fp8.engine=emulated, which computes the same and is slow"


def check_fp8(config: "Config", plan: Plan) -> None:
    """Raise UserError where the hardware of `plan` has no engine, or settings exclude each other."""
    fp8, on = config.precision.fp8, plan.hardware.name
    if fp8 is None:
        return
    fast = fp8.engine is FP8Engine.scaled_mm or (fp8.engine is FP8Engine.auto and on != "cpu")
    if fast and on not in HOPPER:
        raise UserError(
            f"precision.fp8.engine={fp8.engine.name} needs a Hopper GPU ({', '.join(HOPPER)}), and "
            f"hardware.name={on} here: {_OTHERWISE}"
        )
    by_tensor = "precision.fp8.granularity=tensor"
    if fp8.granularity is Granularity.tensor:
        if fast:
            raise UserError(f"{by_tensor} is emulated only, to show what it does: {_OTHERWISE}")
        for name in ("dispatch", "gather"):
            if getattr(fp8, name):
                raise UserError(
                    f"precision.fp8.{name}=true quantises in tiles, and {by_tensor} here: take one of the two"
                )
    sharding = config.parallel.fsdp
    if fp8.gather and sharding is not None and sharding.cpu_offload:
        raise UserError(
            "precision.fp8.gather=true quantises shards on the device, and parallel.fsdp.cpu_offload=true "
            "keeps them on the host: take one of the two"
        )
