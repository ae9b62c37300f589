"""What of a model FP8 takes: rows of the plan's table."""

from dsv3.model.config import ModelConfig
from dsv3.parallel.degrees import Degrees
from dsv3.planning import weights
from dsv3.planning.parameters import numel
from dsv3.planning.shape import FP8Shape
from dsv3.planning.sharding import multiplies_in_fp8, travels_in_fp8
from dsv3.planning.weights import Weight


def fp8_rows(model: ModelConfig, degrees: Degrees, fp8: FP8Shape | None) -> list[tuple[str, str]]:
    """The shares of the parameters that multiply in FP8 and are gathered in it; whether rows travel so."""
    if fp8 is None:
        return []
    every = [*weights.main_model(model), *(w for depth in weights.mtp_modules(model) for w in depth)]
    taken = [weight for weight in every if multiplies_in_fp8(weight)]
    rows = [("products in FP8", _share(taken, every))]
    if fp8.gather:
        rows.append(("gathered in FP8", _share([w for w in taken if travels_in_fp8(w, degrees)], every)))
    if fp8.dispatch and degrees.ep > 1:
        rows.append(("rows to experts", "FP8, and back in the compute dtype"))
    return rows


def _share(some: list[Weight], every: list[Weight]) -> str:
    return f"{numel(some):,} parameters, {numel(some) / numel(every):.1%}"
