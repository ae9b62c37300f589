"""Schemas of the `optimizer` group: the optimizers of torch.optim for dense parameters, and Muon.

A schema of torch.optim has PyTorch's own keys and defaults (torch 2.13; a test compares them), except AdamW,
which has the report's constants. Left out are the keys that choose an implementation (foreach, capturable,
differentiable, fused) and `maximize`: a loss is minimised.
"""

from dataclasses import dataclass, field
from enum import Enum
from typing import Any, ClassVar

from dsv3.config.precision import ComputeType, MomentType
from dsv3.config.registry import SCHEMAS, Buildable, schema
from dsv3.errors import UserError, did_you_mean, require, require_positive

TORCH = "torch.optim."

ADAMW = f"{TORCH}AdamW"

SLOWEST_BF16_BETA = 1 - 2**-8
"""bf16 has 8 significant bits: a change of a value by less than 2^-8 of it may be rounded away."""

NORMS = "*norm.weight"
"""The pattern of the norms: they and biases are the one-dimensional parameters, and no layer has a bias."""

NO_ARGUMENT = {"argument": False}
"""Metadata of a key that is not an argument of the optimizer's constructor."""

_WITHOUT_SCHEMA = {
    "LBFGS": "it calls the loss several times per step, and a step here has one gradient",
    "SparseAdam": "it takes sparse gradients, and every gradient here is dense",
    "Muon": "it takes matrices alone; optimizer=muon is Muon for the whole model",
}


@dataclass
class OptimizerConfig(Buildable):
    """The base of conf/optimizer: the learning rate, and the groups of parameters by patterns of their names.

    A pattern is a file name pattern over the names of the parameters, in which `*` also matches dots:
    `layers.*.attention.*`, `mtp.*`, `embedding.weight` (docs/optimizers.md).
    """

    lr: float = 3e-3
    """Peak learning rate; the schedule multiplies it."""
    no_decay: list[str] = field(default_factory=lambda: [NORMS], metadata=NO_ARGUMENT)
    """Patterns of the parameters without weight decay; the norms by default."""
    lr_scale: dict[str, float] = field(default_factory=dict, metadata=NO_ARGUMENT)
    """Factors of the learning rate by pattern; the factors of all patterns that match are multiplied."""
    frozen: list[str] = field(default_factory=list, metadata=NO_ARGUMENT)
    """Patterns of the parameters and expert biases that are not trained: no gradient, no optimizer state."""

    factored_state: ClassVar[bool] = False
    """The state of a matrix is one value per row and one per column."""

    def state_bytes_per_parameter(self, moments: MomentType) -> int | None:
        """Return the bytes of optimizer state per parameter that the plan counts; None if not known.

        The schema of another optimizer overrides this method; without it the plan assumes AdamW's 8 bytes.
        Counters of steps, a number per tensor, are left out.
        """

        def chosen(key: str) -> bool:
            return bool(getattr(self, key, False))

        name = self._target_.removeprefix(TORCH) if self._target_.startswith(TORCH) else ""
        if name in ("AdamW", "Adam"):
            values = 2 + chosen("amsgrad")
        elif name in ("NAdam", "RAdam", "Adamax", "Adadelta", "Rprop"):
            values = 2
        elif name in ("Adagrad", "ASGD", "Adafactor"):
            values = 1
        elif name == "RMSprop":
            values = 1 + chosen("momentum") + chosen("centered")
        elif name == "SGD":
            values = int(chosen("momentum"))
        else:
            return None
        return values * (2 if moments is MomentType.bf16 else 4)

    def state_bytes_per_hidden_parameter(self, moments: MomentType) -> int | None:
        """Return the same for the matrices of the hidden layers, which an optimizer may treat by itself."""
        return self.state_bytes_per_parameter(moments)

    def validate(self) -> None:
        require(self.lr >= 0, "lr", self.lr, "must be 0 or more")
        for pattern, factor in self.lr_scale.items():
            require(factor >= 0, f"lr_scale.{pattern}", factor, "must be 0 or more")
        decays = hasattr(self, "weight_decay") or self.no_decay == [NORMS]
        require(decays, "no_decay", self.no_decay, "this optimizer has no weight decay: leave it out")
        self._check_ranges()

    def _check_ranges(self) -> None:
        """Raise InvalidValue for a number of a key that PyTorch would refuse when training begins."""
        for key in ("betas", "etas"):
            pair = getattr(self, key, None)
            if pair is not None and key == "betas":
                right = len(pair) == 2 and all(0 <= beta < 1 for beta in pair)
                require(right, key, list(pair), "must be two numbers from 0 up to 1, like [0.9,0.95]")
            elif pair is not None:
                right = len(pair) == 2 and 0 < pair[0] < 1 < pair[1]
                require(right, key, list(pair), "must be a number below 1 and one above 1, like [0.5,1.2]")
        for key in ("weight_decay", "momentum", "momentum_decay", "lr_decay", "initial_accumulator_value"):
            value = getattr(self, key, 0.0)
            require(value >= 0, key, value, "must be 0 or more")
        for key in ("rho", "alpha"):
            value = getattr(self, key, 0.0)
            require(0 <= value <= 1, key, value, "must lie between 0 and 1")
        eps = getattr(self, "eps", 1.0)
        if isinstance(eps, float):
            require(eps > 0, "eps", eps, "must be above 0")


@schema("optimizer/adamw")
@dataclass
class AdamWConfig(OptimizerConfig):
    """torch.optim.AdamW with the report's constants (section 4.2)."""

    _target_: str = ADAMW
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay of the first and of the second moment per step."""
    eps: float = 1e-8
    """Added to the root of the second moment."""
    weight_decay: float = 0.1
    """Decoupled weight decay, as a share of the learning rate; `no_decay` has none."""
    fused: bool = True
    """Use PyTorch's fused kernel."""


@schema("optimizer/adam")
@dataclass
class AdamConfig(OptimizerConfig):
    """torch.optim.Adam: weight decay is added to the gradient, unless it is decoupled."""

    _target_: str = f"{TORCH}Adam"
    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay of the first and of the second moment per step."""
    eps: float = 1e-8
    """Added to the root of the second moment."""
    weight_decay: float = 0.0
    """Weight decay: an L2 penalty, or decoupled."""
    amsgrad: bool = False
    """Divide by the largest second moment so far."""
    decoupled_weight_decay: bool = False
    """Take weight decay out of the gradient, as AdamW does."""


@schema("optimizer/sgd")
@dataclass
class SGDConfig(OptimizerConfig):
    """torch.optim.SGD: stochastic gradient descent, with momentum if it is above 0."""

    _target_: str = f"{TORCH}SGD"
    lr: float = 1e-3
    momentum: float = 0.0
    """Decay of the momentum per step; 0 keeps none."""
    dampening: float = 0.0
    """Share of the gradient that the momentum leaves out."""
    weight_decay: float = 0.0
    """L2 penalty, added to the gradient."""
    nesterov: bool = False
    """Look ahead along the momentum."""

    def validate(self) -> None:
        super().validate()
        right = not self.nesterov or (self.momentum > 0 and self.dampening == 0)
        require(right, "nesterov", self.nesterov, "needs a momentum above 0 and a dampening of 0")


@schema("optimizer/nadam")
@dataclass
class NAdamConfig(OptimizerConfig):
    """torch.optim.NAdam: Adam with Nesterov momentum."""

    _target_: str = f"{TORCH}NAdam"
    lr: float = 2e-3
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay of the first and of the second moment per step."""
    eps: float = 1e-8
    """Added to the root of the second moment."""
    weight_decay: float = 0.0
    """Weight decay: an L2 penalty, or decoupled."""
    momentum_decay: float = 4e-3
    """Decay of the momentum's schedule."""
    decoupled_weight_decay: bool = False
    """Take weight decay out of the gradient, as AdamW does."""


@schema("optimizer/radam")
@dataclass
class RAdamConfig(OptimizerConfig):
    """torch.optim.RAdam: Adam whose second moment counts once its variance is small enough."""

    _target_: str = f"{TORCH}RAdam"
    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay of the first and of the second moment per step."""
    eps: float = 1e-8
    """Added to the root of the second moment."""
    weight_decay: float = 0.0
    """Weight decay: an L2 penalty, or decoupled."""
    decoupled_weight_decay: bool = False
    """Take weight decay out of the gradient, as AdamW does."""


@schema("optimizer/adamax")
@dataclass
class AdamaxConfig(OptimizerConfig):
    """torch.optim.Adamax: Adam with the largest gradient so far in place of the second moment."""

    _target_: str = f"{TORCH}Adamax"
    lr: float = 2e-3
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay of the first moment and of the largest gradient per step."""
    eps: float = 1e-8
    """Added to gradients before the largest is taken."""
    weight_decay: float = 0.0
    """L2 penalty, added to the gradient."""


@schema("optimizer/adagrad")
@dataclass
class AdagradConfig(OptimizerConfig):
    """torch.optim.Adagrad: steps divided by the root of the sum of all squared gradients."""

    _target_: str = f"{TORCH}Adagrad"
    lr: float = 1e-2
    lr_decay: float = 0.0
    """Decay of the learning rate per step, beside the schedule."""
    weight_decay: float = 0.0
    """L2 penalty, added to the gradient."""
    initial_accumulator_value: float = 0.0
    """Start of the sum."""
    eps: float = 1e-10
    """Added to the root of the sum."""


@schema("optimizer/adadelta")
@dataclass
class AdadeltaConfig(OptimizerConfig):
    """torch.optim.Adadelta: steps in the units of the steps before."""

    _target_: str = f"{TORCH}Adadelta"
    lr: float = 1.0
    rho: float = 0.9
    """Decay of both means per step."""
    eps: float = 1e-6
    """Added to both means before their roots."""
    weight_decay: float = 0.0
    """L2 penalty, added to the gradient."""


@schema("optimizer/rmsprop")
@dataclass
class RMSpropConfig(OptimizerConfig):
    """torch.optim.RMSprop: steps divided by the root of the mean square of the gradients."""

    _target_: str = f"{TORCH}RMSprop"
    lr: float = 1e-2
    alpha: float = 0.99
    """Decay of the mean square per step."""
    eps: float = 1e-8
    """Added to the root of the mean square."""
    weight_decay: float = 0.0
    """L2 penalty, added to the gradient."""
    momentum: float = 0.0
    """Decay of the momentum per step; 0 keeps none."""
    centered: bool = False
    """Divide by the root of the variance instead."""


@schema("optimizer/rprop")
@dataclass
class RpropConfig(OptimizerConfig):
    """torch.optim.Rprop: steps by the gradient's sign, of a size that grows while the sign stays.

    `lr` is the size of the first step; the schedule has no other effect.
    """

    _target_: str = f"{TORCH}Rprop"
    lr: float = 1e-2
    etas: tuple[float, float] = (0.5, 1.2)
    """Factors of a step's size where the sign changes and where it stays."""
    step_sizes: tuple[float, float] = (1e-6, 50.0)
    """Smallest and largest size of a step."""


@schema("optimizer/asgd")
@dataclass
class ASGDConfig(OptimizerConfig):
    """torch.optim.ASGD: averaged stochastic gradient descent; the average is kept in the state alone."""

    _target_: str = f"{TORCH}ASGD"
    lr: float = 1e-2
    lambd: float = 1e-4
    """Decay of the weights per step."""
    alpha: float = 0.75
    """Power of the decay of the step size."""
    t0: float = 1e6
    """Step at which averaging begins."""
    weight_decay: float = 0.0
    """L2 penalty, added to the gradient."""


@schema("optimizer/adafactor")
@dataclass
class AdafactorConfig(OptimizerConfig):
    """torch.optim.Adafactor: second moments as rows and columns, steps relative to the size of a weight."""

    _target_: str = f"{TORCH}Adafactor"
    factored_state: ClassVar[bool] = True
    lr: float = 1e-2
    beta2_decay: float = -0.8
    """Power of the step at which the second moment forgets; 0 or less."""
    eps: tuple[Any, Any] = (None, 1e-3)
    """Least second moment (null is fp32's own) and least size of a weight that a step is relative to."""
    d: float = 1.0
    """Largest root mean square of an update."""
    weight_decay: float = 0.0
    """Decoupled weight decay, as a share of the learning rate."""

    def validate(self) -> None:
        super().validate()
        require(self.beta2_decay <= 0, "beta2_decay", self.beta2_decay, "must be 0 or less")
        require(self.d >= 1, "d", self.d, "must be 1 or more")
        numbers = [value for value in self.eps if value is not None]
        right = len(self.eps) == 2 and self.eps[1] is not None
        right = right and all(isinstance(value, int | float) and value >= 0 for value in numbers)
        require(right, "eps", list(self.eps), "must be null or a number, and a number, like [null,1e-3]")


class UpdateScale(Enum):
    """The factor of an orthogonalised update, by the rows and columns of its matrix."""

    match_rms_adamw = "match_rms_adamw"
    original = "original"


@schema("optimizer/muon")
@dataclass
class MuonConfig(OptimizerConfig):
    """Muon for the matrices of the hidden layers, AdamW for the embedding, the head, routers and norms."""

    _target_: str = "dsv3.training.muon.Muon"
    momentum: float = 0.95
    """Decay of the momentum per step."""
    nesterov: bool = True
    """Look ahead along the momentum."""
    ns_coefficients: tuple[float, float, float] = (3.4445, -4.775, 2.0315)
    """Coefficients of the quintic Newton-Schulz iteration that orthogonalises an update."""
    ns_steps: int = 5
    """Iterations."""
    ns_dtype: ComputeType = ComputeType.auto
    """Dtype of the iteration; auto is bf16 on a GPU and fp32 on CPU."""
    ns_eps: float = 1e-7
    """Least norm that an update is divided by."""
    update_scale: UpdateScale = UpdateScale.match_rms_adamw
    """match_rms_adamw: 0.2 sqrt(max(rows, columns)), AdamW's size; original: sqrt(max(1, rows / columns))."""
    weight_decay: float = 0.1
    """Decoupled weight decay, as a share of the learning rate; `no_decay` has none."""
    adamw_betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's decay of the first and of the second moment per step."""
    adamw_eps: float = 1e-8
    """AdamW's addition to the root of the second moment."""
    adamw_lr_scale: float = field(default=1.0, metadata=NO_ARGUMENT)
    """Factor of the learning rate for AdamW's parameters."""

    def state_bytes_per_parameter(self, moments: MomentType) -> int:
        """Return the bytes of AdamW's two fp32 moments."""
        return 8

    def state_bytes_per_hidden_parameter(self, moments: MomentType) -> int:
        """Return the bytes of the one fp32 momentum."""
        return 4

    def validate(self) -> None:
        super().validate()
        require(0 <= self.momentum < 1, "momentum", self.momentum, "must be 0 or more and below 1")
        require(0 < self.ns_steps < 100, "ns_steps", self.ns_steps, "must be above 0 and below 100")
        right = len(self.ns_coefficients) == 3
        require(right, "ns_coefficients", list(self.ns_coefficients), "must be three numbers")
        right = len(self.adamw_betas) == 2 and all(0 <= beta < 1 for beta in self.adamw_betas)
        shown = list(self.adamw_betas)
        require(right, "adamw_betas", shown, "must be two numbers from 0 up to 1, like [0.9,0.95]")
        require_positive(self, "ns_eps", "adamw_eps")
        require(self.adamw_lr_scale >= 0, "adamw_lr_scale", self.adamw_lr_scale, "must be 0 or more")


def check_moments(optimizer: OptimizerConfig, moments: MomentType) -> None:
    """Raise InvalidValue, by the keys of the root, where `optimizer` cannot keep its moments in `moments`.

    A running mean that is rounded after each step stands still where a step changes it too little. With a
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


def refuse_without_schema(target: str) -> None:
    """Raise UserError for a class of torch.optim that is no choice of the group."""
    name = target.removeprefix(TORCH)
    if not target.startswith(TORCH) or "." in name:
        return
    targets = [str(getattr(node, "_target_", "")) for node in SCHEMAS.values()]
    close = did_you_mean(
        name, [each.removeprefix(TORCH) for each in targets if each.startswith(TORCH)], TORCH
    )
    why = _WITHOUT_SCHEMA.get(name) or f"it has no schema.{close}"
    raise UserError(f"optimizer._target_={target} is not possible: {why} (docs/optimizers.md)")
