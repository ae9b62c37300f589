"""Schemas of the `task` group, with what the launcher must know of a task before it imports torch."""

from dataclasses import dataclass, field
from enum import Enum
from typing import ClassVar

from dsv3.config.registry import PATH, Buildable, schema
from dsv3.errors import require, require_positive

_OF_EVERY_TASK = ("task", "run")
"""A sweep of any task has a directory."""

_OF_A_MODEL = (
    "experiments",
    "model",
    "parallel",
    "precision=",
    "precision.compute",
    "precision.fp8",
    "hardware",
    "launch",
    "checkpoint.load",
)
"""What a task reads that loads a model and does not train it."""


class OutputFormat(Enum):
    """The output of task=plan and task=compare."""

    text = "text"
    json = "json"


@dataclass
class TaskConfig(Buildable):
    """The base of conf/task."""

    uses_model: ClassVar[bool] = True
    """The task runs a model: it needs workers and a device. A task of arithmetic alone does not."""
    lays_out: ClassVar[bool] = True
    """The task spreads a model over its ranks; without, each of them does the same."""
    trains: ClassVar[bool] = False
    """The task obeys the constraints of a training batch."""
    must_fit: ClassVar[bool] = False
    """The task is refused where its plan does not fit into the device's memory."""
    holds_model: ClassVar[bool] = False
    """The task is refused where not even the weights fit into the device's memory."""
    writes_run: ClassVar[bool] = False
    """The task needs a run directory of its own."""
    reads_rows: ClassVar[bool] = False
    """The task reads rows of data without training: each must split over the ranks of its sequence."""
    has_result: ClassVar[bool] = True
    """The task returns a number, as a loss, which a search minimizes."""
    path_is_model_path: ClassVar[bool] = False
    """The task's `path` is model.path where it is null."""
    reads_checkpoint: ClassVar[bool] = False
    """The task reads a run by checkpoint.load and does not resume it."""
    chooses_layout: ClassVar[bool] = False
    """The task plans many layouts of its config, whatever its own is."""
    replays: ClassVar[bool] = False
    """The task computes steps of the run `task.run` again, by the run's own config."""
    reads: ClassVar[tuple[str, ...]] = ("*",)
    """The keys and nodes that the task reads, `precision=` for the choice alone; others are refused."""

    @classmethod
    def reads_key(cls, key: str) -> bool:
        """Return True where the task reads `key`, dotted from the root; a group's name is its choice."""
        return any(
            name == "*" or key == name.removesuffix("=") or key.startswith(f"{name}.") for name in cls.reads
        )


@schema("task/train")
@dataclass
class TrainTaskConfig(TaskConfig):
    """Train, evaluate now and then, save checkpoints, and report the result."""

    trains: ClassVar[bool] = True
    must_fit: ClassVar[bool] = True
    writes_run: ClassVar[bool] = True
    _target_: str = "dsv3.tasks.train.TrainTask"


@schema("task/evaluate")
@dataclass
class EvaluateTaskConfig(TaskConfig):
    """Held-out loss of a checkpoint."""

    holds_model: ClassVar[bool] = True
    reads_rows: ClassVar[bool] = True
    reads_checkpoint: ClassVar[bool] = True
    reads: ClassVar[tuple[str, ...]] = (
        *_OF_EVERY_TASK,
        *_OF_A_MODEL,
        "compile",
        "data",
        "tokenizer",
        "train.sequence_length",
        "train.global_batch_size",
        "train.microbatch_size",
        "train.evaluate_tokens",
        "train.deterministic",
    )
    _target_: str = "dsv3.tasks.evaluate.EvaluateTask"


@dataclass
class SamplingConfig:
    """The sampling of text."""

    max_tokens: int = 120
    """Most tokens to sample."""
    temperature: float = 0.8
    """Divisor of the logits; 0 takes the likeliest token."""
    top_p: float = 0.95
    """Probability of the nucleus that tokens are sampled from."""

    def validate(self) -> None:
        require_positive(self, "max_tokens")
        allowed = "must be 0 (greedy) or at least 0.01"
        require(self.temperature == 0 or self.temperature >= 0.01, "temperature", self.temperature, allowed)
        require(0 < self.top_p <= 1, "top_p", self.top_p, "must be above 0 and at most 1")


@schema("task/generate")
@dataclass
class GenerateTaskConfig(TaskConfig, SamplingConfig):
    """Text that continues a prompt."""

    has_result: ClassVar[bool] = False
    holds_model: ClassVar[bool] = True
    reads_checkpoint: ClassVar[bool] = True
    reads: ClassVar[tuple[str, ...]] = (
        *_OF_EVERY_TASK,
        *_OF_A_MODEL,
        "tokenizer=",
        "tokenizer.path",
        "train.seed",
    )
    _target_: str = "dsv3.tasks.generate.GenerateTask"
    prompt: str = "def "
    """Text to continue."""


@schema("task/replay")
@dataclass
class ReplayTaskConfig(TaskConfig):
    """A step of a run once more, from the nearest checkpoint: the accident in it repeats, or does not."""

    has_result: ClassVar[bool] = False
    trains: ClassVar[bool] = True
    must_fit: ClassVar[bool] = True
    replays: ClassVar[bool] = True
    reads: ClassVar[tuple[str, ...]] = (
        *_OF_EVERY_TASK,
        "parallel",
        "precision",
        "recompute",
        "compile",
        "hardware",
        "launch=",
        "launch.nproc",
        "launch.nnodes",
        "launch.node_rank",
        "launch.rendezvous",
        "launch.timeout",
        "data.path",
        "data.dataset",
        "data.cache_dir",
        "data.cache_bytes",
        "train.microbatch_size",
        "train.deterministic",
        "optimizer.fused",
        "model.attention.kernel",
    )
    """Where to compute and how: what is learnt is the run's."""
    _target_: str = "dsv3.tasks.replay.ReplayTask"
    run: str | None = field(default=None, metadata=PATH)
    """Run directory; nothing is written into it."""
    step: int | None = None
    """Optimizer step to compute again, from 1."""
    text: int = 0
    """Characters to print of each sequence of the step's batch (ids without a tokenizer); 0 is none."""

    def validate(self) -> None:
        require(bool(self.run), "run", self.run, "give the directory of a run: task.run=outputs/TIME")
        require(self.step is not None, "step", self.step, "give the step to compute again: task.step=N")
        require_positive(self, "step")
        require(self.text >= 0, "text", self.text, "must be at least 0 characters")


@schema("task/plan")
@dataclass
class PlanTaskConfig(TaskConfig):
    """Memory, traffic and speed of a layout, by arithmetic alone."""

    has_result: ClassVar[bool] = False
    uses_model: ClassVar[bool] = False
    trains: ClassVar[bool] = True
    _target_: str = "dsv3.tasks.plan.PlanTask"
    format: OutputFormat = OutputFormat.text
    """text, or json: the whole of stdout is one object."""
    pictures: str | None = field(default=None, metadata=PATH)
    """Directory for memory.png, timeline.png and timeline.html; null draws none."""

    def validate(self) -> None:
        require(self.pictures != "", "pictures", "", "must be a directory; null draws none")


@schema("task/calibrate")
@dataclass
class CalibrateTaskConfig(TaskConfig):
    """Measure, for plans with launch.nproc ranks, how much of its peaks this machine reaches."""

    has_result: ClassVar[bool] = False
    lays_out: ClassVar[bool] = False
    reads: ClassVar[tuple[str, ...]] = (*_OF_EVERY_TASK, "hardware", "launch")
    _target_: str = "dsv3.tasks.calibrate.CalibrateTask"
    output: str | None = field(default=None, metadata=PATH)
    """YAML file to write; null is the one in the cache where plans on this machine look."""
    seconds: float = 45.0
    """Seconds to measure for, besides the start."""
    size: int | None = None
    """Width of the largest matmul; null is 1,024 on a CPU and 8,192 on a GPU."""
    format: OutputFormat = OutputFormat.text
    """text, or json: the whole of stdout is one object."""

    def validate(self) -> None:
        require_positive(self, "seconds", "size")
        require(self.size is None or self.size >= 64, "size", self.size, "must be at least 64")
        name = self.output
        right = name is None or name.endswith((".yaml", ".yml"))
        require(right, "output", name, "must be a file name that ends in .yaml")


@dataclass
class LayoutTaskConfig(TaskConfig):
    """The base of the tasks that choose layouts."""

    has_result: ClassVar[bool] = False
    uses_model: ClassVar[bool] = False
    chooses_layout: ClassVar[bool] = True
    reads: ClassVar[tuple[str, ...]] = (
        *_OF_EVERY_TASK,
        "model",
        "parallel",
        "precision",
        "recompute",
        "compile",
        "optimizer",
        "hardware",
        "launch",
        "train.sequence_length",
        "train.global_batch_size",
        "train.microbatch_size",
        "train.batch_ramp",
        "checkpoint.load",
        "checkpoint.async_save",
    )
    format: OutputFormat = OutputFormat.text
    """text, or json: the whole of stdout is one object."""


@schema("task/search")
@dataclass
class SearchTaskConfig(LayoutTaskConfig):
    """The fastest layouts of a model on a world, and the fastest for each amount of memory."""

    _target_: str = "dsv3.tasks.search.SearchTask"
    top: int = 10
    """Fastest layouts to print."""
    picture: str | None = field(default=None, metadata=PATH)
    """PNG file for a picture of speed against memory; null draws none."""

    def validate(self) -> None:
        require_positive(self, "top")
        if self.picture is not None:
            allowed = "must be a file name that ends in .png"
            require(self.picture.endswith(".png"), "picture", self.picture, allowed)


@schema("task/fit")
@dataclass
class FitTaskConfig(LayoutTaskConfig):
    """Find what can be trained on given hardware: every model of the family, or one on every kind of GPU."""

    _target_: str = "dsv3.tasks.fit.FitTask"


@schema("task/verify")
@dataclass
class VerifyTaskConfig(TaskConfig):
    """Weights of a checkpoint against HF transformers, layer by layer, on random rows of ids in fp32."""

    has_result: ClassVar[bool] = False
    path_is_model_path: ClassVar[bool] = True
    reads: ClassVar[tuple[str, ...]] = (*_OF_EVERY_TASK, "experiments", "model", "hardware", "launch")
    _target_: str = "dsv3.tasks.verify.VerifyTask"
    path: str | None = field(default=None, metadata=PATH)
    """HuggingFace checkpoint; null is model.path."""
    sequences: int = 2
    """Random rows of the input."""
    tokens: int = 64
    """Tokens per row."""
    tolerance: float = 1e-4
    """Largest error, relative to the norm of what is compared."""

    def validate(self) -> None:
        require(bool(self.path), "path", self.path, "give a HuggingFace checkpoint: model=hf model.path=DIR")
        require_positive(self, "sequences", "tolerance")
        require(self.tokens >= 2, "tokens", self.tokens, "must be at least 2")


@schema("task/prepare")
@dataclass
class PrepareTaskConfig(TaskConfig):
    """Token shards of text, JSON lines, Parquet or a dataset, to train on with data=shards."""

    uses_model: ClassVar[bool] = False
    has_result: ClassVar[bool] = False
    reads: ClassVar[tuple[str, ...]] = (
        *_OF_EVERY_TASK,
        "data=",
        "data.field",
        "data.separator",
        "data.max_skipped",
        "data.held_out",
        "tokenizer",
    )
    _target_: str = "dsv3.tasks.prepare.PrepareTask"
    input: list[str] = field(default_factory=list)
    """Files, folders or patterns of names; a folder of save_to_disk, or hf:OWNER/NAME, is a dataset."""
    output: str | None = field(default=None, metadata=PATH)
    """Folder for the shards and their index."""
    workers: int | None = None
    """Cores to use; null is all that the process may use."""
    subset: str | None = None
    """Subset (config) of a dataset of the hub; null is its default."""
    split: str | None = None
    """Split of a dataset to read; null is `train`, or the only one."""

    def validate(self) -> None:
        allowed = "give files, folders or a pattern of names: task.input=PATHS"
        require(bool(self.input) and all(self.input), "input", self.input, allowed)
        require(bool(self.output), "output", self.output, "give a folder for the shards: task.output=DIR")
        require_positive(self, "workers")


@schema("task/compare")
@dataclass
class CompareTaskConfig(TaskConfig):
    """The runs of a directory, such as a sweep's, by held-out loss."""

    has_result: ClassVar[bool] = False
    uses_model: ClassVar[bool] = False
    reads: ClassVar[tuple[str, ...]] = _OF_EVERY_TASK
    _target_: str = "dsv3.tasks.compare.CompareTask"
    runs: str | None = field(default=None, metadata=PATH)
    """Directory that holds the runs, such as multirun/ID."""
    output: str | None = field(default=None, metadata=PATH)
    """PNG file of the loss curves; null is compare.png in the directory of `runs`."""
    reference: str | None = None
    """One of the jobs: also print the distance of the others' training losses from its own."""
    mixed_data: bool = False
    """Rank runs whose held-out data differ, too, with a column of what differs; off refuses them."""
    format: OutputFormat = OutputFormat.text
    """text, or json: the whole of stdout is one object."""

    def validate(self) -> None:
        allowed = "give the directory that holds the runs: task.runs=multirun/ID"
        require(bool(self.runs), "runs", self.runs, allowed)
        if self.output is not None:
            require(
                self.output.endswith(".png"), "output", self.output, "must be a file name that ends in .png"
            )


@schema("task/cache")
@dataclass
class CacheTaskConfig(TaskConfig):
    """List and clear the cache of prepared data."""

    has_result: ClassVar[bool] = False
    uses_model: ClassVar[bool] = False
    reads: ClassVar[tuple[str, ...]] = (*_OF_EVERY_TASK, "data.cache_dir")
    _target_: str = "dsv3.tasks.cache.CacheTask"
    clear: str | None = None
    """What to remove: all, unused, or the name of an entry, in which `*` stands for any characters."""
    unused_days: float = 30.0
    """Days without a use after which an entry counts as unused."""
    format: OutputFormat = OutputFormat.text
    """text, or json: the whole of stdout is one object."""

    def validate(self) -> None:
        allowed = "give all, unused or the name of an entry, or leave it out to list them"
        require(self.clear is None or bool(self.clear.strip()), "clear", self.clear, allowed)
        require(self.unused_days >= 0, "unused_days", self.unused_days, "must be at least 0 days")
