"""The nearest change of a command that lets its model fit, where its plan does not.

Each suggestion has been planned as if it were typed, with every check that a plan passes, and fits: nothing
is suggested that would be refused again. They are tried from the nearest to the farthest:

- on the same ranks: no host copies for a save, more recomputation, smaller microbatches;
- on other numbers of ranks: more shards, or fewer processes where the ranks of a machine share its memory;
- on other axes: context, tensor, pipeline or expert parallelism;
- shorter sequences;
- other hardware: the GPUs of conf/hardware, each with the fewest ranks that it needs.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from dsv3.config.convergence import shown
from dsv3.config.hardware import CPU, HardwareConfig
from dsv3.config.launch import LaunchConfig
from dsv3.config.parallel import KEY, DegreesConfig, ParallelConfig, RecomputeMode
from dsv3.config.precision import ComputeType
from dsv3.config.registry import layout_degrees
from dsv3.config.root import Config
from dsv3.config.task import PlanTaskConfig
from dsv3.errors import UserError
from dsv3.launch.job import Job, plan_job
from dsv3.planning import parameters
from dsv3.planning.checks import GIB, PARAMETER_BYTES
from dsv3.planning.hardware import host_memory, named_hardware
from dsv3.planning.layout import check_wrappers
from dsv3.planning.plan import Plan
from dsv3.planning.report import describe_need

MOST_RANKS = 2**16
"""More than any cluster has: a plan that does not fit there fits nowhere."""

SHORTEST = 128
"""Tokens of the shortest sequence that is suggested."""

_FILLED = ("train.global_batch_size", "train.microbatch_size")
"""Values that were filled in to suit the layout, and are filled in anew on another."""


def require_fits(job: Job) -> None:
    """Raise UserError for a plan that does not fit, in two lines with the numbers and the nearest fix."""
    plan = job.plan
    if plan.fits is False:
        model = f"{parameters.total(plan.model):,} parameters"
        layout = f"{model} on {plan.world_size:,} ranks of hardware={plan.hardware.name}"
        raise UserError(f"{layout} do not fit: a rank {describe_need(plan)}\n{nearest_fix(job)}")


def nearest_fix(job: Job) -> str:
    """Return the nearest change that makes a job fit whose plan does not."""
    search = _Search(job)
    return next(search.fixes(), None) or search.elsewhere()


class _Search:
    """Plans changes of one job."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.plan = job.plan
        self.shares_host = job.host_ranks is not None
        config = job.config
        for key in _FILLED:
            if key in job.reasons:
                config = _with(config, key, None)
        self.base: dict[str, Any] = {}
        if config.parallel.fsdp is None:  # one rank: the preset that shards takes its place
            degrees = DegreesConfig(**layout_degrees(job.choices.get("model", ""), "fsdp"))
            config = replace(config, parallel=ParallelConfig(degrees=degrees))
            self.base["parallel"] = "fsdp"
        # Nothing of a sample is to be planned, and nobody asks nvidia-smi again.
        own = replace(job.hardware, memory_bytes=None) if self.shares_host else job.hardware
        train = replace(config.train, generate_every=0)
        self.config = replace(config, task=PlanTaskConfig(), hardware=own, train=train)
        self.saves = {"checkpoint.async_save": False} if self.plan.shape.host_copies else {}

    def fixes(self) -> Iterator[str]:
        """Yield the changes that fit on this hardware, the nearest first."""
        if self.shares_host and self._exceeds_host():
            return
        yield from self._on_same_ranks()
        yield from self._on_other_ranks()
        yield from self._on_other_axes()
        if self.job.config.task.reads_key("train.sequence_length"):  # a replay has those of its run
            yield from self._with_shorter_sequences()

    def elsewhere(self) -> str:
        """Return what to do where no change fits on this hardware: the GPUs that the layout fits, if any."""
        replays = self.job.config.task.replays
        found = [] if replays else list(self._on_other_hardware())
        if self.shares_host:
            host = (host_memory() or 0) / GIB
            here = f"nothing fits into the {host:,.1f} GiB that the ranks of this machine share"
        else:
            here = f"no layout, batch or sequence length fits hardware={self.plan.hardware.name}"
        if not found:
            return f"{here}: {'replay it where it was trained' if replays else 'take a smaller model'}"
        return f"{here}; {' and '.join(found)} {'fits' if len(found) == 1 else 'fit'}"

    def _exceeds_host(self) -> bool:
        """Return True where this machine cannot even hold the weights once, however they are shared out."""
        host = host_memory()
        size = parameters.total(self.plan.model) * PARAMETER_BYTES
        return host is not None and size > host * self.config.launch.nnodes

    def _on_same_ranks(self) -> Iterator[str]:
        if self.base:  # a layout of several ranks is another one
            return
        modes: list[dict[str, Any]] = [
            {"recompute": mode} for mode in (RecomputeMode.selective, RecomputeMode.full)
        ]
        full = self.saves | self._recomputed()
        size = self.plan.shape.microbatch_size
        sizes = [size // 2**n for n in range(1, size.bit_length()) if size % 2**n == 0]
        tried = [self.saves, *modes, *(self.saves | mode for mode in modes)]
        tried += [full | {"train.microbatch_size": size} for size in sizes]
        for typed in _unique(tried):
            found = self._plan(typed, self.plan.world_size)
            if found is not None and found.fits:
                yield _told(typed, None)

    def _on_other_ranks(self) -> Iterator[str]:
        """Yield more shards; where ranks share the memory of one machine, fewer of them."""
        shards, strongest = self.plan.degrees.dp_shard, self._strongest()
        rest = self.plan.world_size // shards
        counts = [2**n * shards for n in range(1, 17)]
        if self.shares_host:
            counts = [shards // 2**n for n in range(1, 17) if shards % 2**n == 0]
        recomputed = self._recomputed()
        for more in [{}, *_unique([recomputed, self.saves | recomputed, strongest])]:
            typed = {**self.base, **more}
            if found := self._first_that_fits(typed, counts):
                count, plan = found
                typed |= {f"{KEY}.dp_shard": count, **self._batch(plan)}
                yield _told(typed, count * rest)

    def _first_that_fits(
        self,
        typed: Mapping[str, Any],
        counts: Sequence[int],
        hardware: HardwareConfig | None = None,
        config: Config | None = None,
    ) -> tuple[int, Plan] | None:
        """Return the first number of shards with which a change fits, and its plan."""
        rest = self.plan.world_size // self.plan.degrees.dp_shard
        for count in counts:
            if count * rest > MOST_RANKS:
                return None
            plan = self._plan({**typed, f"{KEY}.dp_shard": count}, count * rest, hardware, config)
            if plan is not None and plan.fits:
                return count, plan
            room = None if plan is None or self.shares_host else plan.hardware.memory_bytes
            if plan is not None and room is not None and plan.memory.activations > room:
                return None  # no number of shards lowers these
        return None

    def _on_other_axes(self) -> Iterator[str]:
        """Yield other degrees of the axes that split activations, on the same ranks and on more."""
        degrees, strongest = self.plan.degrees, self._strongest()
        for axis in ("cp", "tp", "pp", "ep"):
            degree = getattr(degrees, axis)
            for factor in (2, 4, 8, 16, 32, 64):
                world = self.plan.world_size * (1 if axis == "ep" else factor)
                typed = {**self.base, **strongest, f"{KEY}.{axis}": degree * factor}
                found = self._plan(typed, world) if world <= MOST_RANKS else None
                if found is not None and found.fits:
                    same = None if world == self.plan.world_size and not self.base else world
                    yield _told(typed | self._batch(found), same)

    def _with_shorter_sequences(self) -> Iterator[str]:
        length = self.plan.shape.sequence_length
        while not self.config.data.sets_sequence_length and length // 2 >= SHORTEST and not self.base:
            length //= 2
            typed = {**self._strongest(), "train.sequence_length": length}
            found = self._plan(typed, self.plan.world_size)
            if found is not None and found.fits:
                yield _told(typed, None)

    def _on_other_hardware(self) -> Iterator[str]:
        """Yield, for two sizes of GPU, the plan to ask for with the fewest ranks that fit."""
        own, sizes = self.plan.hardware, set[int | None]()
        config = self.config
        if "precision.compute" in self.job.reasons:
            config = _with(config, "precision.compute", ComputeType.auto)
        shards = self.plan.degrees.dp_shard
        rest = self.plan.world_size // shards
        larger = [
            gpu
            for gpu in named_hardware()
            if own.name == CPU or (gpu.memory_bytes or 0) > (own.memory_bytes or 0)
        ]
        for gpu in larger:
            if len(sizes) == 2 or gpu.memory_bytes in sizes:
                continue
            for more in [{}, *_unique([self._recomputed(), self._strongest()])]:
                counts = [shards * 2**n for n in range(17)]
                if found := self._first_that_fits(self.base | more, counts, gpu, config):
                    count, plan = found
                    sizes.add(gpu.memory_bytes)
                    typed = self.base | more | ({f"{KEY}.dp_shard": count} if count > shards else {})
                    typed |= self._batch(plan)
                    words = ["task=plan", f"hardware={gpu.name}", *_words(typed)]
                    yield " ".join([*words, f"launch.world_size={count * rest}"])
                    break

    def _recomputed(self) -> dict[str, Any]:
        full = RecomputeMode.full
        return {} if self.plan.shape.recompute is full else {"recompute": full}

    def _strongest(self) -> dict[str, Any]:
        """Return all that lowers what a rank holds beside its shards."""
        small = {"train.microbatch_size": 1} if self.plan.shape.microbatch_size > 1 else {}
        return self.saves | self._recomputed() | small

    def _batch(self, found: Plan) -> dict[str, Any]:
        """Return the batch that a plan had to take in place of a typed one."""
        batch = found.shape.microbatch_size * found.shape.microbatches * found.degrees.data_parallel
        typed = "train.global_batch_size" not in self.job.reasons and batch != self.job.config.train.batch
        return {"train.global_batch_size": batch} if typed else {}

    def _plan(
        self,
        typed: Mapping[str, Any],
        world: int,
        hardware: HardwareConfig | None = None,
        config: Config | None = None,
    ) -> Plan | None:
        """Return the plan of a change, with another batch where the typed one does not divide, if any."""
        changed = config or self.config
        for key, value in typed.items():
            if key != "parallel":
                changed = _with(changed, "recompute.mode" if key == "recompute" else key, value)
        changed = replace(
            changed,
            launch=LaunchConfig(nnodes=changed.launch.nnodes, world_size=world),
            hardware=hardware or changed.hardware,
        )
        attempts = [changed]
        if self.job.config.task.reads_key("train.global_batch_size"):
            attempts.append(_with(changed, "train.global_batch_size", None))
        for attempt in attempts:
            try:
                plan = plan_job(attempt, []).plan
                check_wrappers(attempt.parallel, plan.degrees)
            except UserError:
                continue
            return plan
        return None


def _told(typed: Mapping[str, Any], world_size: int | None) -> str:
    """Return a change as words; `world_size` are its ranks, None as many as before."""
    words = " and ".join(_words(typed))
    verb = "fits" if len(typed) == 1 else "fit"
    if world_size is None:
        return f"{words} {verb} on the same ranks"
    return f"{words} {verb}, with launch.nproc x launch.nnodes = {world_size:,} ranks"


def _words(typed: Mapping[str, Any]) -> list[str]:
    """Return keys and values as they are typed."""
    return [f"{key}={shown(getattr(value, 'value', value))}" for key, value in typed.items()]


def _unique(changes: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the changes that change something, each once."""
    return [each for place, each in enumerate(changes) if each and each not in changes[:place]]


def _with(config: Any, key: str, value: Any) -> Any:
    """Return a config with another value of a dotted key."""
    node, _, rest = key.partition(".")
    return replace(config, **{node: _with(getattr(config, node), rest, value) if rest else value})
