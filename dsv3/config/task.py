"""What each task can be told."""

from dataclasses import dataclass
from enum import Enum
from typing import ClassVar

from dsv3.errors import require, require_positive


class PlanFormat(Enum):
    """How task=plan and task=compare print."""

    text = "text"
    json = "json"


@dataclass
class TaskConfig:
    """The base of conf/task; what the launcher must know of a task before it imports torch for it.

    `uses_model` tasks run in workers on a device, `trains` ones obey the laws of the batch, `must_fit`
    ones are refused where their plan does not fit, `holds_model` ones where not even the weights do,
    `writes_run` ones need a run directory of their own.
    """

    uses_model: ClassVar[bool] = True
    trains: ClassVar[bool] = False
    must_fit: ClassVar[bool] = False
    holds_model: ClassVar[bool] = False
    writes_run: ClassVar[bool] = False
    _target_: str = ""
    _recursive_: bool = False
    _convert_: str = "object"


@dataclass
class TrainTaskConfig(TaskConfig):
    """Train, evaluate now and then, save, and tell how it went."""

    trains: ClassVar[bool] = True
    must_fit: ClassVar[bool] = True
    writes_run: ClassVar[bool] = True
    _target_: str = "dsv3.tasks.train.Train"


@dataclass
class EvaluateTaskConfig(TaskConfig):
    """Held-out loss of a checkpoint."""

    holds_model: ClassVar[bool] = True
    _target_: str = "dsv3.tasks.evaluate.Evaluate"


@dataclass
class SamplingConfig:
    """How text is sampled: `temperature` 0 takes the likeliest token, `top_p` keeps the nucleus."""

    max_tokens: int = 120
    temperature: float = 0.8
    top_p: float = 0.95

    def validate(self) -> None:
        require_positive(self, "max_tokens")
        allowed = "must be 0 (greedy) or at least 0.01"
        require(self.temperature == 0 or self.temperature >= 0.01, "temperature", self.temperature, allowed)
        require(0 < self.top_p <= 1, "top_p", self.top_p, "must be above 0 and at most 1")


@dataclass
class GenerateTaskConfig(TaskConfig, SamplingConfig):
    """Text that continues `prompt`."""

    holds_model: ClassVar[bool] = True
    _target_: str = "dsv3.tasks.generate.Generate"
    prompt: str = "def "


@dataclass
class PlanTaskConfig(TaskConfig):
    """What a layout would need, by arithmetic alone."""

    uses_model: ClassVar[bool] = False
    trains: ClassVar[bool] = True
    _target_: str = "dsv3.tasks.plan.Plan"
    format: PlanFormat = PlanFormat.text


@dataclass
class VerifyTaskConfig(TaskConfig):
    """Weights of `path` (default: model.path) against HF transformers, layer by layer.

    `tolerance` is relative to the norm of what is compared, in fp32; the input is `sequences` random
    rows of `tokens` ids.
    """

    _target_: str = "dsv3.tasks.verify.Verify"
    path: str | None = None
    sequences: int = 2
    tokens: int = 64
    tolerance: float = 1e-4

    def validate(self) -> None:
        require(bool(self.path), "path", self.path, "give a HuggingFace checkpoint: model=hf model.path=DIR")
        require_positive(self, "sequences", "tolerance")
        require(self.tokens >= 2, "tokens", self.tokens, "must be at least 2")


@dataclass
class CompareTaskConfig(TaskConfig):
    """The runs of a directory, such as a sweep's, by held-out loss.

    The curves are drawn into `output`, a PNG; null is compare.png in the directory of `runs`.
    `reference` names one of the jobs: how far the others' training losses are from its own.
    """

    uses_model: ClassVar[bool] = False
    _target_: str = "dsv3.tasks.compare.Compare"
    runs: str | None = None
    output: str | None = None
    reference: str | None = None
    format: PlanFormat = PlanFormat.text

    def validate(self) -> None:
        allowed = "give the directory that holds the runs: task.runs=multirun/ID"
        require(bool(self.runs), "runs", self.runs, allowed)
        if self.output is not None:
            require(
                self.output.endswith(".png"), "output", self.output, "must be a file name that ends in .png"
            )
