"""What parallel.expert.backend=deepep needs, asked before any process starts; imports no torch.

The numbers are those of DeepEP 1.2.1: groups for which it has a tuned config, and nodes of 8 GPUs.
"""

import importlib.util
from typing import TYPE_CHECKING

from dsv3.parallel.config import ExchangeBackend
from dsv3.parallel.degrees import KEY
from dsv3.parallel.filling import expert_degrees
from dsv3.parallel.nearest import join, nearest_of
from dsv3.planning.plan import Plan
from dsv3.planning.sharding import BLOCK
from dsv3.precision.config import ComputeType
from dsv3.runtime.errors import UserError

if TYPE_CHECKING:
    from dsv3.config import Config

SIZES = (2, 4, 8, 16, 24, 32, 64, 128, 144, 160)
"""Ranks that one exchange can have."""
NODE = 8
"""Ranks of a node where an exchange spans several."""
_NAME = "parallel.expert.backend=deepep"
_ELSE = "take parallel.expert.backend=all_to_all"


def check_backend(config: "Config", plan: Plan) -> None:
    """Raise UserError where DeepEP is chosen and cannot carry what this job sends, or is not here."""
    expert, degrees = config.parallel.expert, plan.degrees
    if degrees.ep == 1 or expert is None or expert.backend is not ExchangeBackend.deepep:
        return
    if plan.hardware.name == "cpu":
        raise UserError(f"{_NAME} needs CUDA GPUs, and hardware.name=cpu here: {_ELSE}")
    compute = config.precision.compute
    if compute is not ComputeType.bf16:
        raise UserError(
            f"{_NAME} carries bf16 rows, and precision.compute={compute.name} here: take precision=bf16, "
            f"or {_ELSE}"
        )
    if config.precision.fp8 is not None and config.precision.fp8.dispatch:
        _check_tiles(plan.model.dim)
    _check_size(plan)
    _check_nodes(degrees.ep, plan.shape.ranks_per_node)
    # A plan is made anywhere; a job that Slurm will start may find the package there.
    if config.task.uses_model and not config.launch.submits and importlib.util.find_spec("deep_ep") is None:
        raise UserError(missing("no module of this name here"))


def missing(why: str) -> str:
    """The message for a package that cannot be imported."""
    return (
        f"{_NAME} needs the package deep_ep (1.2.1, github.com/deepseek-ai/DeepEP): {why}\n"
        f"install it into this environment, or {_ELSE}"
    )


def _check_tiles(dim: int) -> None:
    if dim % BLOCK:
        works = join(sorted({max(BLOCK, dim // BLOCK * BLOCK), (dim // BLOCK + 1) * BLOCK}))
        raise UserError(
            f"{_NAME} carries FP8 rows in whole tiles of {BLOCK}, and model.dim={dim} here: nearest that "
            f"work: {works}; or take precision.fp8.dispatch=false, or {_ELSE}"
        )


def _check_size(plan: Plan) -> None:
    ep = plan.degrees.ep
    if ep not in SIZES:
        works = nearest_of(set(expert_degrees(plan.degrees, plan.model)) & set(SIZES), ep)
        near = f"nearest that work: {join(works)}; or {_ELSE}" if works else f"no value works: {_ELSE}"
        raise UserError(f"{KEY}.ep={ep} is no size that {_NAME} has; {near}")


def _check_nodes(ep: int, ranks_per_node: int | None) -> None:
    """One exchange stays within a node, or takes whole nodes of 8."""
    if ranks_per_node is None or (ranks_per_node == NODE if ep > NODE else ranks_per_node % ep == 0):
        return
    needs = f"nodes of {NODE} ranks" if ep > NODE else f"nodes of a multiple of {ep} ranks"
    raise UserError(
        f"{_NAME} with {KEY}.ep={ep} needs {needs}, and a node has {ranks_per_node} here: {_ELSE}"
    )
