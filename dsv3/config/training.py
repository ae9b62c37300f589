"""Schemas of the `schedule` group and of the `train` node."""

from dataclasses import dataclass, field
from typing import Any, TypeVar

from dsv3.config.accidents import AccidentsConfig
from dsv3.config.convert import StoredType
from dsv3.config.registry import Buildable, schema
from dsv3.errors import closest_values, require, require_positive

Number = TypeVar("Number", int, float)

BIAS_SPEED = 0.001
"""Change of the expert bias per step in the report (section 4.2)."""

EVALUATE_TOKENS = 2**17
"""Held-out tokens of an evaluation: their loss has a standard error below 0.01 nats. The default corpus holds
out fewer, so that all of it is scored."""

GENERATE_EVERY = 100
"""Steps between two samples where a sample is cheap ..."""

GENERATE_SHARE = 0.25
"""... which it is up to this share of the time of these steps, and up to train.generate_seconds."""

SEEDS = 2**63
"""Seeds are 64-bit integers to torch and signed ones to NumPy."""


@dataclass
class ScheduleConfig(Buildable):
    """The base of conf/schedule."""

    warmup_steps: int = 0
    """Steps over which the learning rate rises linearly from 0."""
    total_steps: int | None = None
    """Steps of the whole schedule; null is train.steps, and a resumed run keeps its own."""

    def validate(self) -> None:
        require(self.warmup_steps >= 0, "warmup_steps", self.warmup_steps, "must be 0 or more")
        require_positive(self, "total_steps")
        for key in ("final", "decay", "factor"):
            share = getattr(self, key, 0.0)
            require(0 <= share <= 1, key, share, "must lie between 0 and 1")


@schema("schedule/warmup_cosine")
@dataclass
class WarmupCosineConfig(ScheduleConfig):
    """Linear warm-up, then a cosine."""

    _target_: str = "dsv3.training.schedule.WarmupCosine"
    final: float = 0.1
    """Learning rate at the end, as a share of the peak."""


@schema("schedule/wsd")
@dataclass
class WSDConfig(ScheduleConfig):
    """Warm-up, a constant stretch, and a linear decay."""

    _target_: str = "dsv3.training.schedule.WarmupStableDecay"
    decay: float = 0.2
    """Share of the run over which the learning rate decays."""
    final: float = 0.0
    """Learning rate at the end, as a share of the peak."""


@schema("schedule/steps")
@dataclass
class StepsConfig(ScheduleConfig):
    """Warm-up, then a constant that drops at given shares of the run."""

    _target_: str = "dsv3.training.schedule.Steps"
    at: list[float] = field(default_factory=lambda: [0.8, 0.9])
    """Shares of the run at which the learning rate drops, ascending."""
    factor: float = 0.316
    """Factor on the learning rate at each drop."""

    def validate(self) -> None:
        super().validate()
        right = all(0 < share < 1 for share in self.at) and self.at == sorted(self.at)
        require(right, "at", self.at, "must be shares of the run, ascending, like [0.8,0.9]")


@schema("schedule/deepseek_v3")
@dataclass
class DeepSeekV3Config(ScheduleConfig):
    """The report's schedule (section 4.2) with its token counts as shares of 14.8T."""

    _target_: str = "dsv3.training.schedule.DeepSeekV3"
    warmup_steps: int = 2000


@dataclass
class BalanceConfig:
    """Load balance of the experts: the expert bias (aux-loss-free) and the balance losses.

    Report: a bias speed of 0.001 for the first 14.3T of 14.8T tokens, then 0. The report uses no z-loss.
    """

    bias_speed: float | None = None
    """Change of the expert bias per step; null is 0.001, and 0 from a released model: its biases stay."""
    bias_until: float = 14.3 / 14.8
    """Share of the run during which the expert bias is updated."""
    loss_weight: float = 0.0001
    """Weight of the sequence-wise balance loss (alpha of eq. 17)."""
    z_loss_weight: float = 0.0
    """Weight of the router's z-loss (ST-MoE, arXiv 2202.08906; 0.001 there)."""

    @property
    def speed(self) -> float:
        """Return the completed bias_speed."""
        return _completed(self.bias_speed)

    def validate(self) -> None:
        speed = self.bias_speed
        require(speed is None or speed >= 0, "bias_speed", speed, "must be 0 or more")
        require(0 <= self.bias_until <= 1, "bias_until", self.bias_until, "must lie between 0 and 1")
        for key in ("loss_weight", "z_loss_weight"):
            require(getattr(self, key) >= 0, key, getattr(self, key), "must be 0 or more")


@dataclass
class MTPLossConfig:
    """Multi-token prediction loss (report section 4.2: weight 0.3 for 10T of 14.8T tokens, then 0.1)."""

    weight: float = 0.3
    """Weight of the loss until `switch_at`."""
    final_weight: float = 0.1
    """Weight of the loss after `switch_at`."""
    switch_at: float = 10 / 14.8
    """Share of the run at which the weight changes."""

    def validate(self) -> None:
        require(self.weight >= 0, "weight", self.weight, "must be 0 or more")
        require(self.final_weight >= 0, "final_weight", self.final_weight, "must be 0 or more")
        require(0 <= self.switch_at <= 1, "switch_at", self.switch_at, "must lie between 0 and 1")


@dataclass
class BatchRampConfig:
    """Batch-size ramp by tokens; off unless `start` is set, then train.global_batch_size is where it ends.

    Reports: DeepSeek-V3 3,072 to 15,360 sequences over 469B tokens, V2 2,304 to 9,216 over 225B, both
    "gradually"; the increments are not told.
    """

    start: int | None = None
    """Sequences of the first step; null: every step has train.global_batch_size."""
    tokens: int | None = None
    """Tokens over which the batch grows, an equal share of them at each size."""
    increment: int | None = None
    """Sequences by which the batch grows; null is `start`."""

    def validate(self) -> None:
        require_positive(self, "start", "tokens", "increment")
        if self.start is None:
            for key in ("tokens", "increment"):
                require(getattr(self, key) is None, key, getattr(self, key), "it needs batch_ramp.start, too")
        else:
            require(self.tokens is not None, "tokens", None, "give the tokens over which the batch grows")


@dataclass
class TrainConfig:
    """The training loop; every `*_every` counts optimizer steps, and 0 means never.

    The last step writes a checkpoint in any case.
    """

    steps: int = 300
    """Optimizer steps of the run."""
    stop_after: int | None = None
    """Step at which to save and exit 0, without altering the schedule."""
    global_batch_size: int | None = None
    """Sequences per optimizer step; null is 8, or more where ranks or a pipeline need it."""
    batch_ramp: BatchRampConfig = field(default_factory=BatchRampConfig)
    """Batch-size ramp."""
    microbatch_size: int | None = None
    """Sequences per rank and forward pass, the rest by gradient accumulation; null is about 4,096 tokens."""
    prefetch: int = 2
    """Steps whose batches a thread of each rank makes ahead; 0 makes each within its step."""
    sequence_length: int | None = None
    """Tokens per sequence; null is the model's pre-training length."""
    seed: int = 0
    """Seed of the initial weights, of the order of the data and of samples."""
    deterministic: bool = False
    """Refuse operations that are not deterministic: the same seed gives the same bits."""
    clip_norm: float = field(default=1.0, metadata={"unbounded": True})
    """Largest norm of the whole gradient; inf never clips."""
    log_every: int = 20
    """Steps between two lines on the console."""
    checkpoint_every: int = 100
    """Steps between two checkpoints; the last step always writes one."""
    evaluate_every: int = 100
    """Steps between two evaluations on held-out data; the last step has one unless it is 0."""
    evaluate_tokens: int | None = EVALUATE_TOKENS
    """Tokens of an evaluation, in rows spread over the held-out ones; null, as for task=evaluate, is all."""
    generate_every: int | None = None
    """Steps between two text samples, the last step has one too; null is 100, or 0 where they are costly."""
    generate_seconds: float = 30.0
    """Seconds after which a sample is cut off."""
    export_hf_every: int = 0
    """Steps between two exports in HuggingFace format."""
    export_hf_dtype: StoredType = StoredType.bf16
    """Stored type of the weights of these exports; fp8 is in blocks, as DeepSeek released them."""
    check_replicas_every: int = 20
    """Steps between two comparisons of what ranks hold alike; saves compare too, but with 0 nothing does."""
    collect_garbage_every: int = 50
    """Steps between two runs of Python's garbage collection."""
    balance: BalanceConfig = field(default_factory=BalanceConfig)
    """Load balance of the experts."""
    mtp_loss: MTPLossConfig = field(default_factory=MTPLossConfig)
    """Multi-token prediction loss."""
    accidents: AccidentsConfig = field(default_factory=AccidentsConfig)
    """Steps with bad numbers, and a loss that stays above its past."""
    callbacks: dict[str, Any] = field(default_factory=dict)
    """Your own callbacks by name, each a node with a `_target_` and its arguments (docs/extending.md)."""

    @property
    def length(self) -> int:
        """Return the completed sequence_length, in tokens."""
        return _completed(self.sequence_length)

    @property
    def batch(self) -> int:
        """Return the completed global_batch_size, in sequences."""
        return _completed(self.global_batch_size)

    @property
    def sample_every(self) -> int:
        """Return the completed generate_every, in steps."""
        return _completed(self.generate_every)

    @property
    def microbatch(self) -> int:
        """Return the completed microbatch_size, in sequences."""
        return _completed(self.microbatch_size)

    def validate(self) -> None:
        require_positive(self, "steps", "stop_after", "global_batch_size", "microbatch_size")
        require_positive(self, "sequence_length", "clip_norm", "log_every", "evaluate_tokens")
        require_positive(self, "generate_seconds")
        require(self.prefetch >= 0, "prefetch", self.prefetch, "must be 0 (off) or more")
        for key in [name for name in vars(self) if name.endswith("_every") and name != "log_every"]:
            value = getattr(self, key)
            require(value is None or value >= 0, key, value, "must be 0 (never) or more")
        require(0 <= self.seed < SEEDS, "seed", self.seed, f"must be 0 or more and below {SEEDS}")
        if self.batch_ramp.start is not None:
            self._check_ramp(self.batch_ramp.start, self.batch_ramp.increment or self.batch_ramp.start)

    def _check_ramp(self, start: int, increment: int) -> None:
        """Raise InvalidValue for a ramp that does not lead to the batch it ends with."""
        final = self.global_batch_size
        allowed = "give the batch that train.batch_ramp ends with, in sequences"
        require(final is not None, "global_batch_size", final, allowed)
        assert final is not None
        allowed = f"must be below train.global_batch_size={final}, where the ramp ends"
        require(start < final, "batch_ramp.start", start, allowed)
        divisors = [n for n in range(1, final - start + 1) if (final - start) % n == 0]
        near = " or ".join(map(str, closest_values(divisors, increment)))
        allowed = f"must divide {final} - {start} = {final - start}; nearest that work: {near}"
        require(increment in divisors, "batch_ramp.increment", increment, allowed)


def _completed(value: Number | None) -> Number:
    """Return a number that launch/job.py fills in before anything reads it."""
    assert value is not None
    return value


def scored_rows(rows: int, sequence_length: int, tokens: int | None) -> int:
    """Return how many of so many held-out rows an evaluation of `tokens` scores; None is all of them."""
    return rows if tokens is None else min(rows, max(1, tokens // sequence_length))
