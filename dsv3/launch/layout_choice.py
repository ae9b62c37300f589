"""Choose layouts for a command: what it leaves open, what it has typed, and the commands that type the rest.

task=search and task=fit plan many layouts of one config. What is typed stays as it is; an axis is open where
its degree is auto, or where nothing of `parallel` is typed. A typed choice of `parallel` closes the axes that
it does not split: parallel=pp searches pipelines over sharded data alone.
"""

import math
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from dsv3.config.convergence import shown
from dsv3.config.hardware import CPU, HardwareConfig, is_hopper
from dsv3.config.overrides import as_typed, split_override
from dsv3.config.parallel import AUTO, AXES, WORLD_AXES, DegreesConfig, ParallelConfig
from dsv3.config.precision import BlockFP8Config, ComputeType, PrecisionConfig
from dsv3.config.registry import command, recipes
from dsv3.config.root import Config
from dsv3.errors import UserError
from dsv3.launch.job import Job
from dsv3.launch.typed_keys import typed_leaves
from dsv3.planning.checks import GIB
from dsv3.planning.hardware import detect_hardware, named_hardware
from dsv3.planning.layout_search import Found, LayoutSearch
from dsv3.planning.layout_space import Choices, Layout, LayoutSpace

TOKENS_PER_STEP = 2**22
"""Tokens of a step where neither a batch is typed nor the model has a report: about 4 million."""

_ROUNDED = 1.02
"""Most that the batch of a report may grow to be a multiple of the ranks."""

_ROUNDED_FOR_ODD, _SEQUENCES = 1.1, 64
"""Where it has to grow because the ranks have an odd factor: most that it may, and sequences per rank that a
larger batch makes room for, so that a microbatch can have more than one."""

MOST_RANKS = 2**16
"""Largest world that is tried where a smaller one does not do."""

_OWN = ("task", "run", "launch.world_size", "hydra")
"""Keys of a search's own command: the commands that it prints have others in their place."""


@dataclass(frozen=True)
class Request:
    """A config for which a layout is wanted, with what its command has typed."""

    config: Config
    """As composed: null and auto values are not filled in."""
    typed: Mapping[str, str]
    """Overrides by their keys; the choice of a group by the group's name."""
    model: str
    """The choice of `model`."""
    parallel: str | None = None
    """The choice of `parallel`, if it is typed."""

    @classmethod
    def of(cls, job: Job) -> "Request":
        """Return the request of a command."""
        pairs = {override: pair for override in job.typed if (pair := split_override(override))}
        typed = dict(typed_leaves(pairs))
        parallel = job.choices.get("parallel") if "parallel" in typed else None
        return cls(job.config, typed, job.choices.get("model", ""), parallel)

    def for_model(self, name: str, config: Config) -> "Request":
        """Return the request with another model, whose composed config is given."""
        typed = {key: override for key, override in self.typed.items() if key.partition(".")[0] != "model"}
        return replace(self, config=config, model=name, typed={**typed, "model": f"model={name}"})

    def with_length(self, length: int) -> "Request":
        """Return the request with another sequence length, as if it were typed."""
        train = replace(self.config.train, sequence_length=length)
        typed = {**self.typed, "train.sequence_length": f"train.sequence_length={length}"}
        return replace(self, config=replace(self.config, train=train), typed=typed)

    def with_hardware(self, hardware: HardwareConfig) -> "Request":
        """Return the request on other hardware, as if it were typed."""
        typed = {key: o for key, o in self.typed.items() if key.partition(".")[0] != "hardware"}
        typed["hardware"] = f"hardware={hardware.name}"
        return replace(self, config=replace(self.config, hardware=hardware), typed=typed)

    def length(self) -> int:
        """Return the tokens of a sequence: as typed, else the model's pre-training length."""
        return self.config.train.sequence_length or self.config.model.rope.original_sequence_length

    def batch(self, world: int) -> tuple[int, str]:
        """Return the sequences of a step on `world` ranks, and where the number comes from."""
        typed = self.config.train.global_batch_size
        if typed is not None:
            return typed, "as typed"
        row, length = recipes().get(self.model), self.length()
        if row is None:
            tokens, source = TOKENS_PER_STEP, f"about {TOKENS_PER_STEP:,} tokens"
        else:
            values = dict(each.split("=") for each in row["batch"])
            own = self.config.model.rope.original_sequence_length
            tokens = int(values["train.global_batch_size"]) * int(values.get("train.sequence_length", own))
            source = f"the tokens per step of {row['source']}"
        sequences = max(1, tokens // length)
        # All ranks may be data parallel where that adds little; an odd factor of the world has to divide it.
        unit, grown = world, _ROUNDED
        if sequences % (world // (world & -world)):
            unit, grown = world * _SEQUENCES, _ROUNDED_FOR_ODD
        while unit % 2 == 0 and -(-sequences // unit) * unit > grown * sequences:
            unit //= 2
        if sequences % unit:
            sequences, source = -(-sequences // unit) * unit, f"{source}, rounded up to suit the ranks"
        return sequences, source

    def space(self, world: int) -> LayoutSpace:
        """Return the layouts on `world` ranks; UserError where nothing can be searched."""
        config = self.config
        hardware = detect_hardware(config.hardware, world)
        if (hardware.name == CPU and hardware.peak_flops_fp32 is None) or hardware.memory_bytes is None:
            known = ", ".join(gpu.name for gpu in named_hardware())
            raise UserError(
                f"hardware={hardware.name} has no known speed to rank layouts by: name a GPU, such as "
                f"hardware=h100 (known: {known}), or measure this machine with task=calibrate"
                + (f"\n{hardware.source}" if hardware.source else "")
            )
        train = replace(config.train, sequence_length=self.length(), global_batch_size=self.batch(world)[0])
        parallel = config.parallel
        if "parallel" not in self.typed:
            degrees = DegreesConfig(
                **{axis: getattr(parallel.degrees, axis) for axis in AXES if self._typed(axis)}
            )
            parallel = replace(ParallelConfig(), degrees=degrees, schedule=parallel.schedule)
            parallel = replace(parallel, reshard_after_forward=config.parallel.reshard_after_forward)
        config = replace(config, parallel=parallel, train=train, hardware=hardware)
        if parallel.fsdp is not None and parallel.fsdp.cpu_offload:
            raise UserError(
                "parallel.fsdp.cpu_offload=true has no predicted speed to rank layouts by: leave it out"
            )
        return LayoutSpace(config, world, hardware, self._choices(config, hardware))

    def _typed(self, axis: str) -> bool:
        return f"parallel.degrees.{axis}" in self.typed

    def _choices(self, config: Config, hardware: HardwareConfig) -> Choices:
        axes: dict[str, int] = {}
        least: dict[str, int] = {}
        given = vars(config.parallel.degrees)
        splits = any(isinstance(given[axis], int) and given[axis] > 1 for axis in ("pp", "cp", "tp"))
        for axis in AXES:
            degree, preset = given[axis], self.parallel is not None and not self._typed(axis)
            if not preset:
                if self._typed(axis) and degree != AUTO and (axis != "dp_shard" or degree is not None):
                    axes[axis] = degree or 1
            elif degree == AUTO:
                # The only axis of its preset (hsdp's replicas) has to split something.
                least[axis] = 1 if splits or axis == "ep" else 2
            elif self.parallel == "none" or (degree in (None, 1) and axis not in ("dp_shard", "ep")):
                axes[axis] = 1
            else:
                least[axis] = 2 if degree not in (None, 1) and axis != "ep" else 1
        pipeline = config.parallel.pipeline
        if "parallel.schedule" in self.typed or any(
            key.startswith("parallel.pipeline") for key in self.typed
        ):
            least["pp"] = 2  # what is typed of pipelines acts on nothing else
        return Choices(
            self._precisions(config, hardware),
            axes,
            least,
            config.parallel.schedule if "parallel.schedule" in self.typed else None,
            pipeline.stages_per_rank if pipeline is not None else None,
            config.parallel.reshard_after_forward,
            config.train.microbatch_size,
            config.recompute.mode if {"recompute", "recompute.mode"} & set(self.typed) else None,
        )

    def _precisions(self, config: Config, hardware: HardwareConfig) -> dict[str, PrecisionConfig]:
        """Return the formats by the choice to type: what is typed, else all that the hardware multiplies."""
        own = config.precision
        if any(
            key == "precision" or key.startswith(("precision.compute", "precision.fp8")) for key in self.typed
        ):
            return {"": own.on(hardware.name)}
        if hardware.name == CPU:
            return {"fp32": replace(own, compute=ComputeType.fp32)}
        bf16 = replace(own, compute=ComputeType.bf16)
        formats = {"bf16": bf16}
        if hardware.peak_flops_fp8 is not None and is_hopper(hardware.name):  # others emulate it, slowly
            formats["fp8"] = replace(bf16, fp8=BlockFP8Config())
        return formats

    def overrides(self, layout: Layout, world: int) -> list[str]:
        """Return what to type for a layout beside `task` and the world: what is typed, and the rest of it."""
        values = {"train.global_batch_size": self.batch(world)[0], **layout.changes()}
        if not values["precision"]:
            del values["precision"]
        own = dict.fromkeys(
            as_typed(override)
            for key, override in self.typed.items()
            if key not in values
            and not any(key == name or key.startswith(f"{name}.") for name in _OWN)
            and not (key == "recompute.mode" and "recompute" in values)
        )
        preset = []
        if "parallel" not in self.typed:  # the preset has every wrapper, and splits no other axis
            preset = ["parallel=fsdp"]
            ones = [f"parallel.degrees.{axis}" for axis in WORLD_AXES if axis != "dp_shard"]
            values = {key: value for key, value in values.items() if key not in ones or value > 1}
        return [*own, *preset, *(f"{key}={shown(value)}" for key, value in values.items())]


def told_layout(request: Request, found: Found, world: int) -> dict[str, Any]:
    """Return a layout that a search has found as JSON, with the command that plans it."""
    layout, pipeline, overrides = found.layout, found.layout.pipeline, request.overrides(found.layout, world)
    words = [*command("train"), "task=plan", *overrides, f"launch.world_size={world}"]
    return {
        "command": shlex.join(words),
        "overrides": overrides,
        "degrees": layout.degrees.to_json(),
        "schedule": pipeline and pipeline.schedule.name,
        "stages_per_rank": pipeline and pipeline.stages_per_rank,
        "reshard_after_forward": layout.reshard_after_forward,
        "microbatch_size": layout.microbatch_size,
        "recompute": layout.recompute.value,
        "precision": layout.precision or request.config.precision.label,
        "memory_bytes": found.memory.to_json(),
        "tokens_per_second_per_gpu": found.speed,
        "step_seconds": found.time.seconds,
    }


def nothing_fits(request: Request, search: LayoutSearch) -> UserError:
    """Return the error for a world on which nothing is legal or fits: the closest, and a world that fits."""
    space, world = search.space, search.space.world
    closest = search.least_memory()
    typed_degrees = request.config.parallel.degrees.typed
    typed = math.prod(number for axis, number in typed_degrees.items() if axis in WORLD_AXES)
    first = math.lcm(world, typed)
    first = first if first > world else 2 * world
    larger = smallest_world(request, first)
    fix = (
        f"the smallest world that fits is launch.world_size={larger}, of {first:,} doubled and so on"
        if larger
        else f"none of {first:,} ranks, doubled and so on up to {MOST_RANKS:,}, fits"
    )
    if closest is None:
        why = space.refusal or "no degrees make this world"
        raise UserError(f"no layout of {world:,} ranks is legal: {why.splitlines()[0]}\n{fix}")
    layout, memory = closest
    degrees = " ".join(f"{axis}={n}" for axis, n in layout.degrees.to_json().items() if n > 1)
    return UserError(
        f"no layout of {world:,} ranks fits hardware={space.hardware.name}: the closest needs "
        f"{memory.total / GIB:,.2f} GiB ({degrees}), a rank has "
        f"{(space.hardware.memory_bytes or 0) / GIB:,.2f}\n{fix}"
    )


def smallest_world(request: Request, first: int = 1) -> int | None:
    """Return the smallest world, of `first` doubled and so on, on which a layout fits; None beyond 65,536."""
    world = first
    while world <= MOST_RANKS:
        if LayoutSearch(request.space(world)).first_that_fits() is not None:
            return world
        world *= 2
    return None


def chosen_world(job: Job) -> int:
    """Return the ranks that a command names; UserError where it names none."""
    launch = job.config.launch
    world = launch.world_size or (launch.nproc * launch.nnodes if launch.nproc else None)
    if world is None:
        raise UserError("no world is given: name the number of GPUs, such as launch.world_size=64")
    return world
