"""The table of what every key of train.py's configuration does, and where it shows.

tests/config/test_every_key.py takes a key at its default and at another value, and demands that what is
observed differs. docs/configuration.md has `shows` as a column. A node stands here by its name where one
observation serves all its keys; the longest entry that a key begins with counts.
"""

import hashlib
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest.mock import patch

import torch

from dsv3.checkpoint.directory import Progress
from dsv3.checkpoint.retention import kept
from dsv3.checkpoint.run_statistics import RunStatistics
from dsv3.config.logger import RunOrigin
from dsv3.config.strict import build
from dsv3.data.batch import collate
from dsv3.data.loader import DataLoader
from dsv3.data.packing import PackedRow
from dsv3.data.prefetch import Prefetcher
from dsv3.distributed.process_group import make_deterministic
from dsv3.errors import RunFailed, UserError
from dsv3.launch.job import Job
from dsv3.launch.rendezvous import Rendezvous
from dsv3.launch.restarts import allowed_restarts
from dsv3.launch.run_dir import check_same_data
from dsv3.launch.slurm import batch_script
from dsv3.metrics.row import MetricsRow
from dsv3.parallel.parallel_model import build_parallel_model
from dsv3.parallel.parallelize import build_on_meta
from dsv3.planning.batch_schedule import BatchSchedule
from dsv3.tasks.setup import load_parts, prepare_data
from dsv3.training.accidents import AccidentWatch
from dsv3.training.callbacks import CompareReplicas, Profile
from dsv3.training.evaluation import evaluate
from dsv3.training.optimizer import build_optimizer
from dsv3.training.schedule import StepHyperparameters, build_schedule
from dsv3.training.step import TrainStep
from dsv3.training.step_guard import StepGuard
from tests.harness.checkpoints import as_bytes
from tests.harness.trained import ALONE
from tests.training.batches import row

STEPS = 3

BATCH_ROW = row(11, 12, 10, seed=1)

BATCHES = [collate([BATCH_ROW, row(16, 17, seed=4)])]
"""Rows of 32 tokens, with several documents in each."""


class Effect(NamedTuple):
    """The effect of a key."""

    shows: str
    """Where a user finds it, for the documentation."""
    observe: Callable[[Job], object] | str
    """What differs; or the name of a run of test_every_key.py that shows it."""
    beside: tuple[str, ...] = ()
    """Overrides that make the key act."""
    values: tuple[str, str] | None = None
    """Two values as typed, where the default and one made from its type do not serve."""


def plan(job: Job) -> object:
    """Return all that task=plan tells, and the shape of a step that it is computed from."""
    return job.plan.to_json(), job.plan.shape, job.hardware


def speed(job: Job) -> object:
    """Return the time of a step that the plan tells, with what it is spent on."""
    return job.plan.to_json()["time"]


def training(job: Job) -> object:
    """Return weights, settings and metrics after three steps on fixed rows."""
    config = job.config
    model = build_parallel_model(config, None, torch.device("cpu"))
    optimizer = build_optimizer(config.optimizer, model.model_parts, config.precision.moments)
    step = TrainStep(model.forward_backward, optimizer, ALONE, config.train.clip_norm)
    schedule, metrics = build_schedule(config), []
    for number in range(1, STEPS + 1):
        lr = config.optimizer.lr * schedule(number)
        now = StepHyperparameters.at(schedule.share(number), lr, config.train)
        known = step(BATCHES, now).known()
        metrics.append({name: value.item() for name, value in known.items()})
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode() + as_bytes(tensor))
    settings = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    return digest.hexdigest(), repr(settings), repr(metrics)


def learning_rates(job: Job) -> object:
    """Return the factors of the learning rate over the run."""
    schedule = build_schedule(job.config)
    return [schedule(number) for number in range(1, job.config.train.steps + 1)]


def attributes(*path: str) -> Callable[[Job], object]:
    """Return an observation of the object that is built from the node at `path`."""

    def observe(job: Job) -> object:
        node = job.config
        for name in path:
            node = getattr(node, name)
        more = {"reshard_after_forward": True} if path[-1] == "fsdp" else {}
        return {key: repr(value) for key, value in vars(build(node, **more)).items()}

    return observe


def data(job: Job) -> object:
    """Return the counts of the data, its first rows, its tokenizer and the folders of its cache."""
    prepared = prepare_data(job.config, ALONE)
    rows = [prepared.train.row(number).tokens.tolist() for number in range(3)] if prepared.train else []
    cache_dir = job.config.data.cache_dir
    files = sorted(path.name for path in Path(cache_dir).iterdir()) if cache_dir else []
    tokenizer = prepared.tokenizer and prepared.tokenizer.fingerprint()
    return prepared.summary, prepared.fingerprint, rows, tokenizer, files


def changed_data(job: Job) -> object:
    """Return what becomes of a resume whose data is not that of the run."""
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder)
        (run / "config.yaml").write_text("{}")
        (run / "environment.json").write_text('{"data": {"fingerprint": "before"}}')
        try:
            return check_same_data("now", None, run, job.config.data.allow_change)
        except UserError as error:
            return str(error).replace(folder, "")


def held_out_tokens(job: Job) -> object:
    """Return the tokens that an evaluation scores."""
    model = build_parallel_model(job.config, None, torch.device("cpu"))
    rows = prepare_data(job.config, ALONE).held_out
    train = job.config.train
    return evaluate(model.forward_backward, rows, train.microbatch, ALONE, train.evaluate_tokens)


def comparisons(job: Job) -> object:
    """Return the steps after which replicas are compared."""
    compared: list[int] = []
    callback = CompareReplicas(
        SimpleNamespace(compare=lambda parts, optimizer, step: compared.append(step)),  # type: ignore[arg-type]
        job.config.train.check_replicas_every,
    )
    for step in range(1, 100):
        here: Any = SimpleNamespace(
            forward_backward=SimpleNamespace(model_parts=[]), optimizer=None, progress=step, step=step
        )
        callback.on_step_end(here)
    return compared


def accidents(job: Job) -> object:
    """Return what becomes of 16 steps with three long gradients, a loss that is NaN, and one that goes up."""
    rules, told = job.config.train.accidents, list[Any]()
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.0)
    guard = StepGuard(rules, RunStatistics(), ALONE.device, optimizer)
    with tempfile.TemporaryDirectory() as folder:
        console: Any = SimpleNamespace(message=told.append)
        about: tuple[Any, ...] = (
            job.config.train,
            job.config.model,
            Path(folder),
            ALONE,
            [],
            guard,
            Progress(),
            console,
        )
        watch = AccidentWatch(*about)
        for step in range(1, 17):
            loss, norm = (2.0 if step < 10 else 4.0), (1.0 if step not in (3, 4, 9) else 5.0)
            loss = torch.nan if step == 8 else loss
            verdict = guard.judge(torch.tensor(loss).isfinite(), torch.tensor(norm))
            row = MetricsRow(step=step, tokens=step * job.config.train.length, loss=loss, grad_norm=norm)
            try:
                watch(row, {"accident": verdict.kind, "spike_limit": verdict.limit})
            except RunFailed as error:
                told.append(str(error))
                break
            told.append((row.skipped, row.alarm, watch.over, watch.wants_rewind))
    return told


def made_ahead(job: Job) -> object:
    """Return the rows that are read before a step asks for one."""
    came, read = threading.Condition(), []
    depth = job.config.train.prefetch

    def note(index: int) -> PackedRow:
        with came:
            read.append(index)
            came.notify_all()
        return BATCH_ROW

    rows: Any = SimpleNamespace(row=note)
    prefetcher = Prefetcher(DataLoader(rows, BatchSchedule(1), 1), depth, torch.device("cpu"))
    prefetcher.start(0, 10)
    with came:
        came.wait_for(lambda: len(read) >= depth, 20)
    prefetcher.close()
    return len(read)


def agent(job: Job) -> object:
    """Return how the launchers of the nodes find each other."""
    meeting = Rendezvous(job.config.launch, 1)
    return meeting.node, meeting.host, meeting.port, job.config.launch.timeout


def restarts(job: Job) -> object:
    """Return the restarts that a job may have."""
    return allowed_restarts(job)


def script(job: Job) -> object:
    """Return the batch script of launch=slurm."""
    return batch_script(job)


def weights(job: Job) -> object:
    """Return the weights that a run starts from."""
    state = load_parts(job.config, None, ALONE).state_dict()
    return [as_bytes(tensor) for _, tensor in sorted(state.items())]


def wandb_init(job: Job) -> object:
    """Return the arguments with which a run is opened in wandb."""
    asked: list[Any] = []

    def init(**arguments: Any) -> None:
        asked.append(arguments)
        raise ValueError("seen")

    with patch("wandb.init", init), tempfile.TemporaryDirectory() as folder:
        logger = build(job.config.logger.filled_in(RunOrigin("")))
        logger.open(Path(folder), {}, notify=lambda line: None)
    for arguments in asked:
        for own in ("dir", "id", "settings"):
            arguments.pop(own, None)
    return repr(asked)


def retained(job: Job) -> object:
    """Return the steps of a run of six checkpoints that stay."""
    with tempfile.TemporaryDirectory() as folder:
        steps = [Path(folder) / f"step-{number}" for number in range(1, 7)]
        for number, step in enumerate(steps, 1):
            step.mkdir()
            progress = Progress(step=number, evaluation_loss=float(abs(number - 2) + 1))
            progress.write(step)
        return sorted(path.name for path in kept(steps, job.config.checkpoint))


def determinism(job: Job) -> object:
    """Return whether PyTorch refuses operations that are not deterministic."""
    try:
        make_deterministic(job.config.train.deterministic, job.config.train.seed)
        return torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)


def fp32_matmuls(job: Job) -> object:
    """Return what PyTorch is told about fp32 matmuls on a GPU."""
    with patch.object(torch, "set_float32_matmul_precision") as told:
        build_on_meta(job.config, torch.device("cuda"))
    return told.call_args


def profiled(job: Job) -> object:
    """Return the steps that the profiler looks at."""
    return vars(Profile(job.config.profile))


def directory(job: Job) -> object:
    """Return the run directory."""
    return job.run_dir


def trusted(job: Job) -> object:
    """Return the modules that a `_target_` may name."""
    return job.config.run.allow_targets


H100 = (
    "task=plan",
    "hardware=h100",
    "parallel=fsdp",
    "launch.world_size=8",
    "train.global_batch_size=16",
)

PP = ("task=plan", "parallel=pp", "model.num_layers=8", "launch.world_size=4", "train.global_batch_size=32")

EP = ("task=plan", "parallel=tp_ep", "launch.world_size=16", "train.global_batch_size=16", "precision=bf16")

SMALL = "train.microbatch_size=1"

FAST = ("task=plan", "parallel=full", "launch.world_size=16", "train.global_batch_size=16", "hardware=h100")
FAST_NODES = (*FAST, "hardware.devices_per_node=2")
FAST_FP8 = (*FAST, "precision=fp8")
FAST_DEEPEP = (
    *("task=plan", "model=16b", "parallel=tp_ep", "launch.world_size=16", "hardware=h100"),
    *("parallel.expert.backend=deepep", "train.global_batch_size=16"),
)
STEP = "the time of a step in plan.txt"

WATCHED = (
    "train.accidents.spike_window=2",
    "train.accidents.spike_factor=3.0",
    "train.accidents.alarm_window=2",
    "train.accidents.alarm_steps=2",
)

RAMP = ("train.global_batch_size=8", "train.batch_ramp.tokens=1000")

YARN = ("model.rope.scaling=yarn",)

PREPARED = ("field", "separator", "max_skipped", "held_out")
"""Keys of data=input that task=prepare reads; tests/tasks/test_prepare.py sees what they do."""

ROWS = ("document_mask", "shuffle", "packing", "fim_rate", "cache_dir")
"""Keys of every source that are about rows."""

EFFECTS: dict[str, Effect] = {
    "model": Effect("parameters in plan.txt, weights and loss", training),
    "model.rope": Effect("weights and loss", training, YARN),
    "model.rope.scaling": Effect("weights and loss", training),
    "model.rope.original_sequence_length": Effect(
        "plan.txt, weights and loss", plan, ("train.sequence_length=null",)
    ),
    "model.attention.kernel": Effect(
        "throughput, and the line `attention` of a run", training, values=("auto", "flex")
    ),
    "model.path": Effect("every number of the model", "model.path"),
    "optimizer": Effect("weights and loss", training),
    "optimizer.dampening": Effect("weights and loss", training, ("optimizer.momentum=0.9",)),
    "optimizer.nesterov": Effect("weights and loss", training, ("optimizer.momentum=0.9",)),
    "optimizer.no_decay": Effect(
        "weights and loss", training, ("optimizer.weight_decay=0.1",), ("[]", '["*"]')
    ),
    "optimizer=rprop.no_decay": Effect(
        "refused: it has no weight decay", training, values=('["*norm.weight"]', '["*"]')
    ),
    "optimizer=adafactor.eps": Effect("weights and loss", training, values=("[null,0.001]", "[null,0.01]")),
    "optimizer=adafactor.d": Effect("weights and loss", training, values=("1.0", "2.0")),
    "optimizer.ns_dtype": Effect("weights and loss", training, values=("auto", "bf16")),
    "optimizer.ns_eps": Effect("weights and loss", training, values=("1e-7", "10.0")),
    "optimizer.lr_scale": Effect("weights and loss", training, values=("{}", "{embedding.weight: 0.5}")),
    "optimizer.frozen": Effect("weights and loss", training, values=("[]", "[embedding.weight]")),
    "schedule": Effect("lr in metrics.jsonl", learning_rates),
    "schedule.total_steps": Effect("lr in metrics.jsonl", learning_rates, values=("null", "600")),
    "train.steps": Effect("rows of metrics.jsonl", "train.steps"),
    "train.stop_after": Effect("rows of metrics.jsonl", "train.stop_after"),
    "train.global_batch_size": Effect("plan.txt, tokens in metrics.jsonl", plan, values=("4", "8")),
    "train.batch_ramp.start": Effect(
        "plan.txt, tokens in metrics.jsonl", plan, (*RAMP, "train.batch_ramp.increment=2"), ("2", "4")
    ),
    "train.batch_ramp.tokens": Effect(
        "plan.txt, tokens in metrics.jsonl", plan, (*RAMP, "train.batch_ramp.start=4"), ("1000", "2000")
    ),
    "train.batch_ramp.increment": Effect(
        "plan.txt, tokens in metrics.jsonl", plan, (*RAMP, "train.batch_ramp.start=4"), ("2", "4")
    ),
    "train.prefetch": Effect("data_wait in metrics.jsonl", made_ahead),
    "train.microbatch_size": Effect("plan.txt, tokens_per_second", plan, values=("1", "2")),
    "train.sequence_length": Effect("plan.txt, tokens in metrics.jsonl", plan, values=("32", "64")),
    "train.seed": Effect("weights and loss", training),
    "train.deterministic": Effect("the bits of a repeated run", determinism),
    "train.clip_norm": Effect("weights and loss", training, values=("1.0", "0.01")),
    "train.log_every": Effect("lines of log.txt", "train.log_every"),
    "train.checkpoint_every": Effect("checkpoints/", "train.checkpoint_every"),
    "train.evaluate_every": Effect("evaluation_loss in metrics.jsonl", "train.evaluate_every"),
    "train.evaluate_tokens": Effect(
        "evaluation_loss in metrics.jsonl", held_out_tokens, values=("null", "1")
    ),
    "train.generate_every": Effect("samples in log.txt", "train.generate_every"),
    "train.generate_seconds": Effect("samples in log.txt", "train.generate_seconds"),
    "train.export_hf_every": Effect("hf/ in the run directory", "train.export_hf_every"),
    "train.export_hf_dtype": Effect("hf/ in the run directory", "train.export_hf_dtype"),
    "train.check_replicas_every": Effect("a run ends where its ranks differ", comparisons),
    "train.collect_garbage_every": Effect("memory_gib in metrics.jsonl", "train.collect_garbage_every"),
    "train.balance": Effect("weights, moe_* and balance_loss in metrics.jsonl", training),
    "train.balance.bias_speed": Effect("moe_bias_range in metrics.jsonl", training, values=("null", "0.5")),
    "train.balance.bias_until": Effect("moe_bias_range in metrics.jsonl", training, values=("1.0", "0.0")),
    "train.mtp_loss": Effect("weights, mtp_loss in metrics.jsonl", training, ("train.steps=3",)),
    "train.accidents.skip": Effect("accidents.jsonl, or the end of the run", accidents, WATCHED),
    "train.accidents.spike_factor": Effect("accidents.jsonl", accidents, WATCHED, ("10.0", "2.0")),
    "train.accidents.spike_window": Effect("accidents.jsonl", accidents, WATCHED, ("2", "4")),
    "train.accidents.most": Effect("the end of the run", accidents, WATCHED, ("10", "1")),
    "train.accidents.within": Effect(
        "the end of the run", accidents, (*WATCHED, "train.accidents.most=1"), ("100", "2")
    ),
    "train.accidents.alarm_rise": Effect("alarm in metrics.jsonl", accidents, WATCHED, ("1.0", "5.0")),
    "train.accidents.alarm_window": Effect("alarm in metrics.jsonl", accidents, WATCHED, ("2", "4")),
    "train.accidents.alarm_steps": Effect("alarm in metrics.jsonl", accidents, WATCHED, ("2", "4")),
    "train.accidents.on_alarm": Effect("the checkpoint that a run goes back to", accidents, WATCHED),
    "train.accidents.max_rewinds": Effect(
        "the end of the run", accidents, (*WATCHED, "train.accidents.on_alarm=rewind"), ("3", "0")
    ),
    "train.callbacks": Effect("what your class does", "train.callbacks"),
    "checkpoint.load": Effect("weights and loss", weights, (), ("null", "{run}")),
    "checkpoint.keep_last": Effect("checkpoints/", retained),
    "checkpoint.keep_every": Effect("checkpoints/", retained, values=("null", "3")),
    "checkpoint.keep_best": Effect("checkpoints/", retained),
    "checkpoint.async_save": Effect("plan.txt, tokens_per_second", plan, ("hardware=cpu",)),
    "run.dir": Effect("the run directory", directory, values=("null", "elsewhere")),
    "run.resume": Effect("refused: resume=DIR sets it", "run.resume"),
    "run.allow_targets": Effect(
        "classes that are built instead of refused", trusted, values=("[]", "[tests]")
    ),
    "data.document_mask": Effect("weights and loss", training),
    "data.held_out": Effect("environment.json", data, values=("0.1", "0.2")),
    "data.shuffle": Effect("loss", data),
    "data.packing": Effect("rows, and their padding in this_run.txt", data),
    "data.fim_rate": Effect("rows, and documents_fim in environment.json", data, values=("0.0", "0.5")),
    "data.sources": Effect(
        "sources in metrics.jsonl",
        data,
        values=(
            "{one: {source: text, path: '{path}', weight: 1}}",
            "{one: {source: text, path: '{path}', weight: 1}, two: {source: stdlib, weight: 3}}",
        ),
    ),
    "data.cache_dir": Effect("the directory of prepared tokens", data, values=("null", "{empty}")),
    "data.path": Effect("environment.json", data, (), ("{path}", "{other}")),
    "data=text.field": Effect("environment.json", data, ("data.path={lines}",), ("text", "body")),
    "data=text.separator": Effect("environment.json", data, (), ("null", "def")),
    "data=text.max_skipped": Effect(
        "refused, or told in this_run.txt", data, ("data.path={mixed}",), ("0.5", "0.01")
    ),
    **{f"data=input.{key}": Effect("the shards and the table of task=prepare", "task") for key in PREPARED},
    **{
        f"data=input.{key}": Effect("nowhere: task=prepare makes no rows, and refuses it", "task")
        for key in ROWS
    },
    "data.allow_change": Effect("a resume with changed data, and training.yaml", changed_data),
    "data=hf.dataset": Effect("environment.json", data, (), ("{stream}", "{stream2}")),
    "data=hf.subset": Effect("environment.json", data, (), ("null", "second")),
    "data=hf.revision": Effect("environment.json; nowhere with a directory, and the run says so", "inert"),
    "data=hf.split": Effect("environment.json", data, (), ("train", "validation")),
    "data=hf.held_out_split": Effect("environment.json", data, (), ("null", "validation")),
    "data=hf.field": Effect("environment.json", data, (), ("text", "body")),
    "data=hf.lanes": Effect("the order of the rows", data, (), ("1", "2")),
    "data=hf.lane_rows": Effect("the order of the rows", data, ("data.lanes=2",), ("1", "2")),
    "data=hf.shuffled_documents": Effect("the order of the rows", data, (), ("2", "1024")),
    "data=shards.path": Effect("environment.json", data, (), ("{shards}", "{shards2}")),
    "data=shards.held_out_path": Effect("this_run.txt, environment.json", data, (), ("null", "{shards2}")),
    "data=shards.dtype": Effect("environment.json", data, ("data.path={flat}",), ("uint16", "uint8")),
    "data=shards.eos_id": Effect(
        "environment.json", data, ("data.path={flat}", "data.dtype=uint16"), ("null", "7")
    ),
    "data=shards.verify": Effect("damage is told at start", attributes("data")),
    "data=shards.cache_bytes": Effect("the size of the cache of remote shards", attributes("data")),
    "data=shards.cache_dir": Effect(
        "the directory of best-fit rows, ends of documents and remote shards",
        data,
        ("data.packing=best_fit",),
        ("null", "{empty}"),
    ),
    "data=tokens.pad_id": Effect("this_run.txt, environment.json", data, (), ("null", "5")),
    "data=tokens.verify": Effect("damage is told at start", attributes("data")),
    "data=tokens.path": Effect("environment.json", data, (), ("{tokens}", "{tokens2}")),
    "data=tokens.cache_dir": Effect("nowhere: nothing is cached, and the run says so", "inert"),
    "tokenizer.vocab_size": Effect("tokenizer/ in the run directory", data, values=("300", "280")),
    "tokenizer.path": Effect("tokenizer/ in the run directory", data, (), ("{tokenizer}", "{tokenizer2}")),
    "hardware.name": Effect("plan.txt and environment.json", plan, ("task=plan",), ("auto", "h100")),
    "hardware.memory_bytes": Effect("plan.txt", plan, ("task=plan",), ("null", "123456789")),
    "hardware.devices_per_node": Effect("traffic in plan.txt", plan, EP, ("8", "2")),
    "hardware.peak_flops_tf32": Effect("mfu in metrics.jsonl", plan, ("task=plan",), ("null", "1e12")),
    "hardware.peak_flops_fp32": Effect("mfu in metrics.jsonl", "hardware.peak_flops_fp32"),
    "hardware.peak_flops_bf16": Effect("mfu in metrics.jsonl", plan, ("task=plan",), ("null", "1e12")),
    "hardware.peak_flops_fp8": Effect("mfu in metrics.jsonl", plan, ("task=plan",), ("null", "1e12")),
    "hardware.memory_bandwidth": Effect(STEP, speed, FAST),
    "hardware.intra_node_bandwidth": Effect(STEP, speed, FAST),
    "hardware.inter_node_bandwidth": Effect(STEP, speed, FAST_NODES),
    "hardware.kernels": Effect(STEP, speed, FAST, ("0.5", "0.25")),
    "hardware.kernels.matmul_fp8": Effect(STEP, speed, FAST_FP8, ("0.5", "0.25")),
    "hardware.kernels.grouped_fp8": Effect(STEP, speed, FAST_FP8, ("0.5", "0.25")),
    "hardware.kernels_fp32": Effect(f"{STEP}; a file of task=calibrate has it", "null"),
    "hardware.network": Effect(STEP, speed, FAST, ("0.5", "0.25")),
    "hardware.network.ring_inter": Effect(STEP, speed, FAST_NODES, ("0.5", "0.25")),
    "hardware.network.all_to_all_inter": Effect(STEP, speed, FAST_NODES, ("0.5", "0.25")),
    "hardware.network.inter_seconds": Effect(STEP, speed, FAST_NODES, ("0.5", "0.25")),
    "hardware.network.deepep_intra": Effect(STEP, speed, FAST_DEEPEP, ("0.5", "0.25")),
    "hardware.network.deepep_inter": Effect(
        STEP, speed, (*FAST_DEEPEP, "parallel.degrees.ep=16", "model.moe.num_experts=16"), ("0.5", "0.25")
    ),
    "hardware.overlap": Effect(STEP, speed, FAST, ("0.5", "0.25")),
    "hardware.overlap.ep_paired": Effect(
        STEP, speed, (*FAST, "parallel.schedule=DualPipeV", "model.num_layers=6"), ("0.5", "0.25")
    ),
    "hardware.calibration": Effect(f"{STEP}, and its source", plan, ("task=plan",), ("null", "'off'")),
    "hardware.source": Effect(STEP, speed, FAST, ("here", "there")),
    "launch.nproc": Effect("processes, plan.txt", plan, ("parallel=fsdp", SMALL), ("2", "4")),
    "launch.nnodes": Effect(
        "processes, plan.txt", plan, ("parallel=fsdp", SMALL, "launch.nproc=2", "task=plan"), ("1", "2")
    ),
    "launch.node_rank": Effect(
        "ranks of this node",
        agent,
        ("parallel=fsdp", SMALL, "launch.nproc=2", "launch.nnodes=2", "launch.rendezvous=a:29500"),
        ("0", "1"),
    ),
    "launch.rendezvous": Effect(
        "the connection of the nodes",
        agent,
        ("parallel=fsdp", SMALL, "launch.nproc=2", "launch.nnodes=2"),
        ("a:29500", "b:29500"),
    ),
    "launch.world_size": Effect("plan.txt", plan, ("task=plan", "parallel=fsdp", SMALL), ("2", "4")),
    "launch.timeout": Effect(
        "stacks/ of a run that hangs",
        agent,
        ("parallel=fsdp", SMALL, "launch.nproc=2", "launch.nnodes=2", "launch.rendezvous=a:29500"),
    ),
    "launch=slurm.nproc": Effect("submit.sh", script, ("parallel=fsdp", SMALL), ("2", "4")),
    "launch=slurm.nnodes": Effect(
        "submit.sh", script, ("parallel=fsdp", SMALL, "launch.nproc=2"), ("1", "2")
    ),
    "launch=slurm.node_rank": Effect(
        "nowhere: Slurm numbers the nodes, and the run says so",
        "inert",
        ("launch.nnodes=2", "launch.nproc=2", "parallel=fsdp", SMALL),
    ),
    "launch=slurm.rendezvous": Effect("nowhere: Slurm names the nodes, and the run says so", "inert"),
    "launch=slurm.world_size": Effect("plan.txt", plan, ("task=plan", "parallel=fsdp", SMALL), ("2", "4")),
    "launch.max_restarts": Effect(
        "processes", restarts, ("parallel=fsdp", SMALL, "launch.nproc=2"), ("0", "2")
    ),
    "launch=slurm.timeout": Effect("submit.sh", script),
    "launch=slurm.max_restarts": Effect("submit.sh", script, values=("0", "2")),
    "launch.requeue": Effect("submit.sh", script),
    "launch.partition": Effect("submit.sh", script),
    "launch.account": Effect("submit.sh", script),
    "launch.time": Effect("submit.sh", script),
    "launch.cpus_per_task": Effect("submit.sh", script, values=("null", "3")),
    "launch.sbatch": Effect("submit.sh", script),
    "profile.enabled": Effect("profile/ in the run directory", "profile.enabled"),
    "profile": Effect("profile/ in the run directory", profiled, ("profile=on",)),
    "logger": Effect("the run in wandb", wandb_init),
    "logger.mode": Effect("the run in wandb, or wandb/ alone", wandb_init, values=("auto", "disabled")),
    "precision.compute": Effect("weights and loss, throughput", training, values=("fp32", "bf16")),
    "precision.matmul": Effect("on a GPU throughput, weights", fp32_matmuls),
    "precision.moments": Effect("memory in plan.txt, weights", training),
    "precision.fp8": Effect("weights and loss, throughput", training, ("precision=fp8",)),
    "precision.fp8.engine": Effect("throughput", training, ("precision=fp8",), ("auto", "scaled_mm")),
    "precision.fp8.dispatch": Effect(
        "traffic in plan.txt, weights", plan, (*EP, "precision=fp8", "hardware=h100")
    ),
    "precision.fp8.gather": Effect("memory in plan.txt", plan, (*H100, "precision=fp8", "model=16b")),
    "recompute.mode": Effect("memory in plan.txt, throughput", plan),
    "recompute.keep": Effect(
        "memory in plan.txt, throughput", plan, ("recompute=selective",), ("[attention]", "[matmuls]")
    ),
    "compile": Effect("throughput", attributes("compile")),
    "parallel.degrees": Effect(
        "plan.txt",
        plan,
        (
            "task=plan",
            "parallel=full",
            "launch.world_size=64",
            "train.global_batch_size=64",
            "model.num_layers=8",
        ),
    ),
    "parallel.reshard_after_forward": Effect("memory in plan.txt", plan, H100, ("null", "false")),
    "parallel.schedule": Effect("bubble in plan.txt, throughput", plan, PP, ("1F1B", "GPipe")),
    "parallel.degrees.dp_replicate": Effect(
        "plan.txt",
        plan,
        ("task=plan", "parallel=fsdp", "launch.world_size=8", "train.global_batch_size=16"),
        ("1", "2"),
    ),
    "parallel.min_world_size": Effect(
        "processes", plan, ("parallel=fsdp", "train.global_batch_size=8"), ("2", "4")
    ),
    "parallel.fsdp": Effect(
        "memory and traffic in plan.txt", attributes("parallel", "fsdp"), ("parallel=fsdp",)
    ),
    "parallel.tensor": Effect("plan.txt", "null", ("task=train", "parallel=tp_ep")),
    "parallel.expert": Effect("plan.txt", "null", ("task=train", "parallel=tp_ep")),
    "parallel.context": Effect("plan.txt", "null", ("task=train", "parallel=cp")),
    "parallel.pipeline": Effect("plan.txt", "null", ("task=train", "parallel=pp")),
    "parallel.expert.backend": Effect(
        "traffic in plan.txt", plan, (*EP, "hardware=h100", "recompute=selective")
    ),
    "parallel.expert.ranks_per_node": Effect("traffic in plan.txt", plan, EP, ("8", "2")),
    "parallel.pipeline.split": Effect("plan.txt", plan, PP, ("null", "[3]")),
    "parallel.pipeline.stages_per_rank": Effect(
        "bubble in plan.txt",
        plan,
        (*PP, "parallel.schedule=Interleaved1F1B", "model.num_layers=16"),
        ("2", "4"),
    ),
    "task": Effect("stdout", "task"),
}


def effect(schema: str, key: str) -> Effect | None:
    """Return the entry of a key of a schema; that of a choice, such as `launch=slurm.nproc`, comes first."""
    chosen = f"{schema.replace('/', '=')}.{key.partition('.')[2]}"
    if chosen in EFFECTS:
        return EFFECTS[chosen]
    parts = key.split(".")
    names = (".".join(parts[:count]) for count in range(len(parts), 0, -1))
    return next((EFFECTS[name] for name in names if name in EFFECTS), None)
