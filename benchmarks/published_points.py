"""Published training speeds of the DeepSeek-V3 family, with the configuration that each publication gives.

A row is what its publication says and nothing else. Where it does not say, one rule holds for all rows: a
microbatch of one sequence of 4,096 tokens, AdamW in fp32, balanced stages, no activation checkpointing, and
nothing hidden but FSDP's traffic.

Every second configuration was held back while the assumptions of conf/hardware were set: the first, third,
fifth, ... are `set`, the others `held back`. A configuration that was measured with several batch sizes is
one. The rule was fixed before any error was looked at.
"""

from dataclasses import dataclass, field, replace
from typing import ClassVar

from dsv3.config.hardware import HardwareConfig
from dsv3.config.model import ModelConfig, MoEConfig
from dsv3.config.parallel import DispatchBackend, RecomputeMode, SavedOp, Schedule
from dsv3.planning.dispatch_volume import DispatchLevel
from dsv3.planning.layout import ParallelDims
from dsv3.planning.pipeline_stages import PipelineShape, StageLayers, build_stages, stages_of_rank
from dsv3.planning.step_shape import FP8Shape, StateBytes, StepShape
from tests.planning.presets import preset

EVERYTHING = tuple(SavedOp)
"""Keep every matmul's result: only norms, activations and the like are computed again."""


@dataclass(frozen=True)
class PublishedShape(StepShape):
    """A step of other software: its own split of the layers, and gradients that are reduced once per step."""

    fused_operators: ClassVar[bool] = True
    layers: tuple[int, ...] = ()
    """Layers of each stage, in order; a stage may have none. Empty balances them."""
    reduces_once: bool = True
    """Megatron's and a pipeline's way; FSDP without a pipeline gathers and reduces for every microbatch."""

    sends_copies: bool = False
    """A token's row travels once per expert, in one exchange over all ranks: Megatron's and torchtitan's way.
    Ours and DeepEP's travels once per rank, and once per node."""

    def dispatch_levels(self, moe: MoEConfig, degrees: ParallelDims) -> list[DispatchLevel]:
        """See StepShape."""
        if not self.sends_copies or degrees.ep == 1:
            return super().dispatch_levels(moe, degrees)
        return [DispatchLevel(degrees.ep, moe.top_k, moe.num_experts // degrees.ep)]

    def fsdp_rounds(self, degrees: ParallelDims) -> tuple[int, int, int]:
        """See StepShape."""
        return (1, 0, 1) if self.reduces_once else super().fsdp_rounds(degrees)

    def stages_of_ranks(self, config: ModelConfig, degrees: ParallelDims) -> list[list[StageLayers]]:
        """See StepShape."""
        if not self.layers:
            return super().stages_of_ranks(config, degrees)
        count, (whole,) = len(self.layers), build_stages(config, 1)
        stages, first = [], 0
        for number, layers in enumerate(self.layers):
            dense = whole.dense[first : first + layers]
            depths = config.mtp_depths if number == count - 1 else 0
            stages.append(StageLayers(number, count, dense, depths, first))
            first += layers
        p = self.pipelining
        ranks = range(degrees.pp)
        return [
            [stages[n] for n in stages_of_rank(p.schedule, rank, degrees.pp, p.per_rank)] for rank in ranks
        ]


@dataclass(frozen=True)
class Point:
    """One published measurement."""

    name: str
    configuration: int
    """Number in the list; odd ones are set, even ones held back."""
    source: str
    model: str
    hardware: str
    degrees: ParallelDims
    shape: PublishedShape
    rate: float | None = None
    """Tokens per second and GPU."""
    seconds: float | None = None
    """Seconds of a step; with `memory` where the publication gives them."""
    memory: float | None = None
    """GiB allocated on the fullest rank."""
    changes: dict[str, int] = field(default_factory=dict)
    """Sizes of the model that differ from the preset's."""
    round_robin: bool = False
    """Experts are dealt round-robin (our model.moe.forced_balance), not drawn at random."""
    hides_dispatch: bool = False
    """The software overlaps token dispatch with computing."""
    graphs: bool = False
    """CUDA graphs launch the kernels."""
    hides_nothing: bool = False
    """The publication turns all overlap off."""
    accumulates: int = 1
    """Runs of the pipeline per optimizer step."""

    @property
    def held_back(self) -> bool:
        """Return True for a point that was not looked at while the assumptions were set."""
        return self.configuration % 2 == 0

    @property
    def model_config(self) -> ModelConfig:
        """Return the model as it was trained."""
        model = replace(preset(self.model), **self.changes)  # type: ignore[arg-type]
        return replace(model, moe=replace(model.moe, forced_balance=self.round_robin))

    def on(self, hardware: HardwareConfig) -> HardwareConfig:
        """Return the hardware with the features of the row's software, by the same numbers for every row."""
        overlap, kernels = hardware.overlap, hardware.kernels
        if self.hides_dispatch:
            overlap = replace(overlap, ep=HIDDEN_DISPATCH)
        if self.hides_nothing:
            overlap = replace(overlap, dp=0.0, ep=0.0, tp=0.0, cp=0.0, pp=0.0)
        if self.graphs:
            kernels = replace(kernels, launch_seconds=0.0, sync_seconds=0.0)
        return replace(hardware, overlap=overlap, kernels=kernels)


HIDDEN_DISPATCH = 1.0
"""Share of token dispatch that software hides which overlaps it: all that there is computing for. The report
says so of DualPipe (arXiv 2412.19437, section 3.2.1)."""


def _shape(
    microbatches: int,
    size: int = 1,
    stages: int = 1,
    schedule: Schedule = Schedule["1F1B"],
    fp8: bool = False,
    recompute: RecomputeMode = RecomputeMode.none,
    keep: tuple[SavedOp, ...] = (),
    deepep: bool = False,
    fp8_dispatch: bool = False,
    layers: tuple[int, ...] = (),
    compiled: bool = True,
    reduces_once: bool = True,
    moments: int = 8,
    gpus_per_node: int = 8,
    reshard: bool = False,
    length: int = 4096,
    sends_copies: bool = False,
    gradient: int = 4,
) -> PublishedShape:
    return PublishedShape(
        microbatch_size=size,
        sequence_length=length,
        microbatches=microbatches,
        recompute=recompute,
        keep=keep,
        reshard_after_forward=reshard,
        state=StateBytes(compute=2, optimizer=moments, gradient=gradient),
        pipelining=PipelineShape(schedule, stages),
        ranks_per_node=gpus_per_node,
        fp8=FP8Shape(dispatch=fp8_dispatch, gather=False) if fp8 else None,
        compiled=compiled,
        dispatch=DispatchBackend.deepep if deepep else DispatchBackend.all_to_all,
        layers=layers,
        reduces_once=reduces_once,
        sends_copies=sends_copies,
    )


SELECTIVE = RecomputeMode.selective
FULL = RecomputeMode.full
VPP = Schedule.Interleaved1F1B
FOURS = (*[4] * 15, 1)
TWOS = (1, *[2] * 30, 0)

BRIDGE = "NVIDIA-NeMo/Megatron-Bridge, scripts/performance/configs/deepseek/deepseek_workload_base_configs.py"
AUTOMODEL = (
    "NVIDIA-NeMo/Automodel, docs/performance-summary.md and examples/benchmark/configs/deepseek_v3_te_deepep"
)
SIMUMAX = "MooreThreads/SimuMax, docs/b200/b200_release_v1.2_summary.md"
TITAN = "nebius/ml-cookbook, pytorch-dsv3-mxfp8/train_671b.sh"


def points() -> list[Point]:
    """Return every published point, in the order of the list."""
    report = Point(
        name="DeepSeek-V3, 2,048 H800",
        configuration=1,
        source="arXiv 2412.19437, sections 3 and 4.2",
        model="671b",
        hardware="h800",
        degrees=ParallelDims(pp=16, dp_shard=128, ep=64),
        # Norms, up-projections and SwiGLU are computed again; rows travel to experts in FP8.
        shape=_shape(120, 1, 2, Schedule.DualPipeV, True, SELECTIVE, EVERYTHING, True, True, TWOS, moments=4),
        rate=1543,
        hides_dispatch=True,
    )
    h100 = ParallelDims(pp=8, dp_shard=64, tp=2, ep=64)
    bridge = Point(
        name="Bridge, 1,024 H100 bf16",
        configuration=2,
        source=BRIDGE,
        model="671b",
        hardware="h100",
        degrees=h100,
        shape=_shape(256, 1, 4, VPP, False, SELECTIVE, EVERYTHING, True, layers=TWOS, gradient=2),
        rate=1061,
    )
    found = [
        report,
        bridge,
        replace(
            bridge,
            name="Bridge, 1,024 H100 fp8",
            configuration=3,
            shape=_shape(256, 1, 2, VPP, True, SELECTIVE, EVERYTHING, True, layers=FOURS, gradient=2),
            rate=1297,
        ),
        Point(
            name="Bridge, 256 GB200 mxfp8",
            configuration=4,
            source=BRIDGE,
            model="671b",
            hardware="gb200",
            degrees=ParallelDims(pp=4, dp_shard=64, ep=64),
            shape=_shape(
                64, 1, 4, VPP, True, SELECTIVE, EVERYTHING, True, layers=FOURS, gpus_per_node=64, gradient=2
            ),
            rate=4912,
            hides_dispatch=True,
            graphs=True,
        ),
        Point(
            name="Bridge, 256 GB300 mxfp8",
            configuration=5,
            source=BRIDGE,
            model="671b",
            hardware="gb300",
            degrees=ParallelDims(pp=2, dp_shard=128, ep=32),
            shape=_shape(32, 1, 8, VPP, True, deepep=True, layers=FOURS, gpus_per_node=64, gradient=2),
            rate=6288,
            hides_dispatch=True,
            graphs=True,
        ),
        Point(
            name="Bridge, 256 B200 mxfp8",
            configuration=6,
            source=BRIDGE,
            model="671b",
            hardware="b200",
            degrees=ParallelDims(pp=8, dp_shard=32, ep=32),
            shape=_shape(128, 1, 2, VPP, True, SELECTIVE, EVERYTHING, True, layers=FOURS, gradient=2),
            rate=3328,
            hides_dispatch=True,
            graphs=True,
        ),
    ]
    automodel = Point(
        name="Automodel, 256 H100 bf16",
        configuration=7,
        source=AUTOMODEL,
        model="671b",
        hardware="h100",
        degrees=ParallelDims(pp=4, dp_shard=64, ep=64),
        shape=_shape(8, 1, 8, VPP, False, FULL, (), True),
        rate=1002,
        changes={"mtp_depths": 0},
        round_robin=True,
    )
    titan = Point(
        name="torchtitan, 256 B200 bf16",
        configuration=9,
        source=TITAN,
        model="671b",
        hardware="b200",
        degrees=ParallelDims(pp=2, dp_shard=64, tp=2, ep=32),
        shape=_shape(64, 1, 2, VPP, False, FULL, length=8192, sends_copies=True),
        rate=651,
        changes={"mtp_depths": 0},
        round_robin=True,
    )
    found += [
        automodel,
        replace(
            automodel,
            name="Automodel, 1,024 H100 bf16",
            configuration=8,
            degrees=ParallelDims(pp=4, dp_shard=256, ep=64),
            rate=865,
            accumulates=4,
        ),
        titan,
        replace(
            titan,
            name="torchtitan, 256 B200 bf16, DeepEP",
            configuration=10,
            shape=replace(titan.shape, dispatch=DispatchBackend.deepep, sends_copies=False),
            rate=859,
        ),
        Point(
            name="Bridge, Moonlight-16B, 16 H100 bf16",
            configuration=11,
            source="github.com/NVIDIA-NeMo/Megatron-Bridge/pull/5021",
            model="moonlight_16b",
            hardware="h100",
            degrees=ParallelDims(dp_shard=16, ep=8),
            shape=_shape(32, 2, deepep=True, moments=4, gradient=2),
            rate=22528,
            hides_dispatch=True,
        ),
        Point(
            name="torchtitan, 16B, 8 H100 bf16",
            configuration=12,
            source="github.com/pytorch/torchtitan/issues/1789",
            model="16b",
            hardware="h100",
            degrees=ParallelDims(dp_shard=8, ep=8),
            shape=_shape(
                1,
                4,
                recompute=SELECTIVE,
                keep=(SavedOp.attention, SavedOp.exchange),
                compiled=False,
                reduces_once=False,
                reshard=True,
            ),
            rate=11550,
            memory=73.32,
        ),
    ]
    return found + _slices()


def _slices() -> list[Point]:
    """Return SimuMax's measurements of 4 layers, of which 1 is dense, on one node of 8 B200."""
    ep8, ep4 = ParallelDims(dp_shard=8, ep=8), ParallelDims(pp=2, dp_shard=4, ep=4)
    rows = [
        ("V3", "671b", ep8, 13, 104.30, {4: 0.6032, 8: 1.1017, 32: 4.1412}),
        ("V3", "671b", ep4, 14, 114.00, {4: 0.4522, 8: 0.7716, 32: 2.7186}),
        ("V2", "236b", ep8, 15, 45.63, {4: 0.3666, 8: 0.6762, 32: 2.7213}),
        ("V2", "236b", ep4, 16, 44.70, {4: 0.2821, 8: 0.4926, 32: 1.7277}),
    ]
    return [
        Point(
            name=f"SimuMax, {family} 4 layers, 8 B200, EP{degrees.ep} PP{degrees.pp}, {count} microbatches",
            configuration=number,
            source=SIMUMAX,
            model=model,
            hardware="b200",
            degrees=degrees,
            shape=_shape(count, sends_copies=True),
            seconds=seconds,
            memory=memory,
            changes={"num_layers": 4, "num_dense_layers": 1, "mtp_depths": 0},
            hides_nothing=True,
        )
        for family, model, degrees, number, memory, times in rows
        for count, seconds in times.items()
    ]
