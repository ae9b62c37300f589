"""What a training run is told: the optimizer, the learning rate's course, and the loop's numbers."""

from dataclasses import dataclass, field

from dsv3.config.precision import MomentType
from dsv3.errors import require, require_positive

ADAMW = "torch.optim.AdamW"

SLOWEST_BF16_BETA = 1 - 2**-8
"""bf16 has 8 significant bits: a change of a number by less than 2^-8 of it may be rounded away."""

SEEDS = 2**63
"""Seeds are 64-bit counts to torch and signed ones to NumPy."""


@dataclass
class OptimizerConfig:
    """The base of conf/optimizer."""

    _target_: str = ""
    _recursive_: bool = False
    _convert_: str = "object"
    lr: float = 3e-3


@dataclass
class AdamWConfig(OptimizerConfig):
    """torch.optim.AdamW with the report's constants (section 4.2); `lr` is the peak of the schedule."""

    _target_: str = ADAMW
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1
    fused: bool = True

    def validate(self) -> None:
        require(self.lr >= 0, "lr", self.lr, "must be 0 or more")
        right = len(self.betas) == 2 and all(0 <= beta < 1 for beta in self.betas)
        require(right, "betas", list(self.betas), "must be two numbers from 0 up to 1, like [0.9,0.95]")
        require_positive(self, "eps")
        require(self.weight_decay >= 0, "weight_decay", self.weight_decay, "must be 0 or more")


def check_moments(optimizer: OptimizerConfig, moments: MomentType) -> None:
    """InvalidValue, by the keys of the root, where `optimizer` cannot keep its moments in `moments`.

    A running mean that is rounded after each step stands still where a step changes it too little: with a
    beta above SLOWEST_BF16_BETA not even gradients of 0 would bring it down.
    """
    if moments is MomentType.fp32:
        return
    key, name, other = "precision.moments", moments.name, "or take precision.moments=fp32"
    target = optimizer._target_
    require(target == ADAMW, key, name, f"only AdamW has them, and optimizer._target_={target}; {other}")
    betas = list(getattr(optimizer, "betas", ()))
    still = f"moments in {name} stand still where 1 - beta is below 2^-8"
    right = max(betas, default=0.0) <= SLOWEST_BF16_BETA
    require(right, "optimizer.betas", betas, f"{still}: take at most {SLOWEST_BF16_BETA} each, {other}")


@dataclass
class ScheduleConfig:
    """The base of conf/schedule; `total_steps` null means train.steps, and a resumed run keeps it."""

    _target_: str = ""
    _recursive_: bool = False
    _convert_: str = "object"
    warmup_steps: int = 0
    total_steps: int | None = None

    def validate(self) -> None:
        require(self.warmup_steps >= 0, "warmup_steps", self.warmup_steps, "must be 0 or more")
        require_positive(self, "total_steps")
        for key in ("final", "decay", "factor"):
            share = getattr(self, key, 0.0)
            require(0 <= share <= 1, key, share, "must lie between 0 and 1")


@dataclass
class WarmupCosineConfig(ScheduleConfig):
    """Linear warm-up, then a cosine down to `final` times the peak."""

    _target_: str = "dsv3.training.schedule.WarmupCosine"
    final: float = 0.1


@dataclass
class WSDConfig(ScheduleConfig):
    """Warm-up, a constant stretch, and a linear decay over the last `decay` share of the run."""

    _target_: str = "dsv3.training.schedule.WarmupStableDecay"
    decay: float = 0.2
    final: float = 0.0


@dataclass
class StepsConfig(ScheduleConfig):
    """Warm-up, then a constant that is multiplied by `factor` at each of the `at` shares of the run."""

    _target_: str = "dsv3.training.schedule.Steps"
    at: list[float] = field(default_factory=lambda: [0.8, 0.9])
    factor: float = 0.316

    def validate(self) -> None:
        super().validate()
        right = all(0 < share < 1 for share in self.at) and self.at == sorted(self.at)
        require(right, "at", self.at, "must be shares of the run, ascending, like [0.8,0.9]")


@dataclass
class DeepSeekV3Config(ScheduleConfig):
    """The report's course (section 4.2) with its token counts as shares of 14.8T."""

    _target_: str = "dsv3.training.schedule.DeepSeekV3"
    warmup_steps: int = 2000


@dataclass
class BalanceConfig:
    """How experts are kept evenly loaded: the selection bias's speed and the sequence-wise loss.

    The bias moves by `bias_speed` a step during the first `bias_until` of the run (report: 0.001 for
    14.3T of 14.8T tokens, then 0); `loss_weight` is eq. 17's alpha. `z_loss_weight` adds the router's
    z-loss (ST-MoE, arXiv 2202.08906; 0.001 there), which the report does not use.
    """

    bias_speed: float = 0.001
    bias_until: float = 14.3 / 14.8
    loss_weight: float = 0.0001
    z_loss_weight: float = 0.0

    def validate(self) -> None:
        require(self.bias_speed >= 0, "bias_speed", self.bias_speed, "must be 0 or more")
        require(0 <= self.bias_until <= 1, "bias_until", self.bias_until, "must lie between 0 and 1")
        for key in ("loss_weight", "z_loss_weight"):
            require(getattr(self, key) >= 0, key, getattr(self, key), "must be 0 or more")


@dataclass
class MTPLossConfig:
    """Weight of the multi-token prediction loss: `weight` until the share `switch_at`, then `final_weight`.

    Report section 4.2: 0.3 for the first 10T of 14.8T tokens, 0.1 after.
    """

    weight: float = 0.3
    final_weight: float = 0.1
    switch_at: float = 10 / 14.8

    def validate(self) -> None:
        require(self.weight >= 0, "weight", self.weight, "must be 0 or more")
        require(self.final_weight >= 0, "final_weight", self.final_weight, "must be 0 or more")
        require(0 <= self.switch_at <= 1, "switch_at", self.switch_at, "must lie between 0 and 1")


@dataclass
class TrainConfig:
    """The loop's numbers; every `*_every` counts optimizer steps, and 0 means never.

    Left null: `sequence_length` is the model's pre-training length, `global_batch_size` 8 sequences or
    one microbatch a data-parallel rank where there are more, `microbatch_size` about 4,096 tokens.
    """

    steps: int = 300
    stop_after: int | None = None
    global_batch_size: int | None = None
    microbatch_size: int | None = None
    sequence_length: int | None = None
    seed: int = 0
    deterministic: bool = False
    clip_norm: float = field(default=1.0, metadata={"unbounded": True})
    """Largest norm of the whole gradient; inf never clips."""
    log_every: int = 20
    checkpoint_every: int = 100
    evaluate_every: int = 100
    evaluate_batches: int | None = None
    generate_every: int = 100
    export_hf_every: int = 0
    collect_garbage_every: int = 50
    balance: BalanceConfig = field(default_factory=BalanceConfig)
    mtp_loss: MTPLossConfig = field(default_factory=MTPLossConfig)

    @property
    def length(self) -> int:
        """The completed sequence_length, in tokens."""
        return _completed(self.sequence_length)

    @property
    def batch(self) -> int:
        """The completed global_batch_size, in sequences."""
        return _completed(self.global_batch_size)

    @property
    def microbatch(self) -> int:
        """The completed microbatch_size, in sequences."""
        return _completed(self.microbatch_size)

    def validate(self) -> None:
        require_positive(self, "steps", "stop_after", "global_batch_size", "microbatch_size")
        require_positive(self, "sequence_length", "clip_norm", "log_every", "evaluate_batches")
        for key in [name for name in vars(self) if name.endswith("_every") and name != "log_every"]:
            value = getattr(self, key)
            require(value >= 0, key, value, "must be 0 (never) or more")
        require(0 <= self.seed < SEEDS, "seed", self.seed, f"must be 0 or more and below {SEEDS}")


def _completed(value: int | None) -> int:
    """A number that runtime/job.py fills in before anything reads it."""
    assert value is not None
    return value
