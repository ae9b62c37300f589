"""What a rank computes at once, as numbers: everything the plan asks of a config beside model and degrees.

What of a model FP8 takes: rows of the plan's table.
"""

from dataclasses import dataclass, field

from dsv3.config.model import ModelConfig
from dsv3.config.parallel import Kept, Recomputed
from dsv3.planning import parameters
from dsv3.planning.layout import ParallelDims
from dsv3.planning.parameters import Weight, numel
from dsv3.planning.pipeline_stages import Pipelining, Stage, stages, stages_of_rank
from dsv3.planning.sharding import multiplies_in_fp8, travels_in_fp8


@dataclass(frozen=True)
class StateBytes:
    """Bytes a number: fp32 master weights and gradients, AdamW's two moments together, the compute dtype."""

    parameter: int = 4
    gradient: int = 4
    optimizer: int = 8
    compute: int = 4

    def to_text(self) -> str:
        """The policy for people, in the words of docs/precision.md."""
        kept = f"master {self.parameter}, gradient {self.gradient}, moments {self.optimizer}"
        return f"{kept}, compute copy {self.compute}"


@dataclass(frozen=True)
class FP8Shape:
    """Linear layers and experts multiply in FP8; whether rows to experts, gathered weights travel in it."""

    dispatch: bool = False
    gather: bool = False


@dataclass(frozen=True)
class StepShape:
    """What a rank computes at once and what it keeps: sequences a microbatch, tokens a row, microbatches.

    `cpu_offload` keeps parameters, gradients and optimizer state in host memory; `staged` is where a save
    in the background is written from copies in that same memory. `ranks_per_node` null is one node.
    """

    microbatch_size: int
    sequence_length: int
    microbatches: int = 1
    recompute: Recomputed = Recomputed.none
    reshard_after_forward: bool = True
    state: StateBytes = field(default_factory=StateBytes)
    fused_kernels: bool = True
    keep: tuple[Kept, ...] = ()
    pipelining: Pipelining = field(default_factory=Pipelining)
    cpu_offload: bool = False
    staged: bool = False
    ranks_per_node: int | None = None
    fp8: FP8Shape | None = None

    @property
    def gathers_in_fp8(self) -> bool:
        """Whether weights are gathered as codes and scales where that can be."""
        return self.fp8 is not None and self.fp8.gather

    def tokens(self, degrees: ParallelDims) -> int:
        """Tokens of a microbatch that the ranks of one tp group share."""
        return self.microbatch_size * self.sequence_length // degrees.cp

    def stages_of_ranks(self, config: ModelConfig, degrees: ParallelDims) -> list[list[Stage]]:
        """The stages of each pipeline rank; all of the model in one without pipeline parallelism."""
        if degrees.pp == 1:
            return [stages(config, 1)]
        p = self.pipelining
        every = stages(config, degrees.pp * p.per_rank, p.split)
        ranks = range(degrees.pp)
        return [
            [every[n] for n in stages_of_rank(p.schedule, rank, degrees.pp, p.per_rank)] for rank in ranks
        ]


def fp8_rows(model: ModelConfig, degrees: ParallelDims, fp8: FP8Shape | None) -> list[tuple[str, str]]:
    """The shares of the parameters that multiply in FP8 and are gathered in it; whether rows travel so."""
    if fp8 is None:
        return []
    every = [*parameters.main_model(model), *(w for depth in parameters.mtp_modules(model) for w in depth)]
    taken = [weight for weight in every if multiplies_in_fp8(weight)]
    rows = [("products in FP8", _share(taken, every))]
    if fp8.gather:
        rows.append(("gathered in FP8", _share([w for w in taken if travels_in_fp8(w, degrees)], every)))
    if fp8.dispatch and degrees.ep > 1:
        rows.append(("rows to experts", "FP8, and back in the compute dtype"))
    return rows


def _share(some: list[Weight], every: list[Weight]) -> str:
    return f"{numel(some):,} parameters, {numel(some) / numel(every):.1%}"
