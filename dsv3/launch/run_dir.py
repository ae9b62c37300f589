"""The run directory: who may write into it, the files that describe the run, and the checks of a resume.

What a run has stored is read as data; nothing is built from it.
"""

import importlib.metadata
import json
import math
import os
import platform
import shlex
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

import yaml

from dsv3.checkpoint.directory import (
    CONFIG_FILE,
    ENVIRONMENT_FILE,
    MODEL_FILE,
    complete_steps,
    is_hf_checkpoint,
    newest_checkpoint,
    step_number,
    write_text,
)
from dsv3.checkpoint.manifest import check_newest
from dsv3.checkpoint.training_record import TrainingRecord, weights_identity
from dsv3.config.convergence import Kind, convergence_hash, flatten, kind
from dsv3.config.overrides import absolute_paths
from dsv3.config.root import Config
from dsv3.config.strict import check_target, to_yaml
from dsv3.config.upgrade import upgrade_node
from dsv3.distributed.device import cpu_threads
from dsv3.distributed.directory_lock import DirectoryLock
from dsv3.errors import UserError
from dsv3.launch.job import Job
from dsv3.launch.trained_on import run_record, training_record
from dsv3.metrics.progress import phase
from dsv3.planning.report import format_plan
from dsv3.tokens.data_record import DataChange, DataRecord
from dsv3.untrusted_files import BadFile, open_file, read_json, read_yaml

OVERRIDES_FILE = "overrides.yaml"

DATA_DIR = "data"
"""What each of the data of a run consisted of, by its fingerprint: data/FINGERPRINT.json."""

_FIXED = (
    *("model", "tokenizer", "data._target_", "data.held_out", "data.shuffle"),
    *("data.lanes", "data.lane_rows", "data.shuffled_documents"),
    *("train.seed", "train.sequence_length"),
)
"""What a run keeps: its weights belong to one model and tokenizer, its place to one order of the rows."""

_CPUINFO_LINES = 64
"""Lines of /proc/cpuinfo that are looked at: the first core's, of which there may be hundreds."""

_PACKAGES = ("dsv3", "torch", "hydra-core", "omegaconf", "numpy", "tokenizers", "safetensors", "wandb")


def read_stored_values(file: Path) -> dict[str, Any]:
    """Return the values of a stored YAML file by their dotted keys, with today's names.

    UserError where the file holds no config.
    """
    try:
        node = upgrade_node(read_yaml(file))
        if not isinstance(node, dict):
            raise TypeError
        return flatten(node)
    except (BadFile, TypeError):
        raise UserError(f"{file} holds no config; is it a run directory?") from None


def check_stored_targets(
    file: Path, stored: Mapping[str, Any], checked: Mapping[str, Any], allow: Sequence[str]
) -> None:
    """Raise UserError for a `_target_` in `file` that may not be built, unless it is among `checked`.

    Nothing is built from stored files; but whoever planted a class there may have planted more.
    """
    for key, target in stored.items():
        if key.rpartition(".")[2] == "_target_" and target != checked.get(key):
            check_target(str(target), f"{file}: {key}", allow)


def check_can_make(directory: Path, resume: bool = False) -> None:
    """Raise UserError where a run directory could not be made or written: long before the run makes it."""
    if resume and not os.access(directory, os.W_OK | os.X_OK):
        raise UserError(
            f"resume={directory} is not writable, and a run goes on in its own directory: "
            f"checkpoint.load={directory} begins a new run from its weights"
        )
    require_room_for(directory, f"run.dir={directory} cannot be made")


def require_room_for(directory: Path, told: str) -> None:
    """Raise UserError, which begins with `told`, where a directory could not be made or written."""
    path = directory.absolute()
    above = next(folder for folder in (path, *path.parents) if os.path.lexists(folder))
    if not above.is_dir():
        raise UserError(f"{told}: {above} is no directory")
    if not os.access(above, os.W_OK | os.X_OK):
        raise UserError(f"{told}: {above} is not writable; name another")


def check_run_dir(directory: Path, resume: bool) -> None:
    """Raise UserError unless the run may start in `directory`: an existing run can only be resumed."""
    if directory.exists() and not directory.is_dir():
        raise UserError(f"run.dir={directory} is a file: name a directory")
    if (directory / CONFIG_FILE).exists() and not resume:
        raise UserError(
            f"run.dir={directory} holds a run already: continue it with resume={directory} or name another"
        )
    if not resume:
        require_unused(directory)


def require_unused(directory: Path) -> None:
    """Raise UserError for a run.dir that another command has written: a run would replace its files."""
    from dsv3.tokens.shard_index import INDEX_FILE  # it imports numpy

    shards, weights = (directory / INDEX_FILE).exists(), (directory / ".metadata").exists()
    if shards or weights or is_hf_checkpoint(directory):
        raise UserError(
            f"run.dir={directory} holds {'token shards' if shards else 'a checkpoint'}: "
            f"name a new directory, {shlex.join([f'run.dir={directory}-run'])}"
        )


@contextmanager
def owned_run_dir(job: Job) -> Iterator[None]:
    """Own the run directory while the body runs, in the one process that writes it or starts its writer.

    A default directory has no name yet that a second command could know: `make_run_dir` takes it. A task that
    writes no run, which may read one, owns nothing.
    """
    writes = os.environ.get("RANK", "0") == "0" and job.config.launch.node_rank == 0
    try:
        if job.config.task.writes_run and job.named_run_dir and writes:
            check_run_dir(job.run_dir, job.config.run.resume)
            check_can_make(job.run_dir, job.config.run.resume)
            own_run_dir(job)
        yield
    finally:
        for lock in job.held:
            lock.release()
        job.held.clear()


def own_run_dir(job: Job, directory: Path | None = None) -> None:
    """Own the job's run directory, or `directory`, from now on, unless the job owns one already.

    Raises:
        UserError: another command owns it, or it cannot be made.
    """
    if job.held:
        return
    directory = directory or job.run_dir
    named = f"{'resume' if job.config.run.resume else 'run.dir'}={directory}"
    lock = DirectoryLock(directory, named)
    try:
        with phase("waiting for the run directory"):
            lock.take()
    except OSError as error:
        raise UserError(f"{named} cannot be written: {error.strerror or error}") from None
    job.held.append(lock)


def make_run_dir(job: Job) -> Path:
    """Make the job's run directory, and own it; a default one gets a number behind its name to be new."""
    directory = job.run_dir.absolute()
    try:
        if job.named_run_dir:
            directory.mkdir(parents=True, exist_ok=True)
            _set_aside_checkpoints(directory)
        else:
            directory = make_new_dir(directory)
    except OSError as error:
        raise UserError(f"run.dir={directory} cannot be made: {error.strerror}") from None
    own_run_dir(job, directory)
    return directory


def make_new_dir(directory: Path) -> Path:
    """Make a directory that nobody has made before, with a number behind its name where it exists."""
    made, number = directory, 1
    directory.parent.mkdir(parents=True, exist_ok=True)
    while True:
        try:
            made.mkdir()  # fails where it exists: of two commands in the same second one gets the next number
            return made
        except FileExistsError:
            number += 1
            made = directory.with_name(f"{directory.name}_{number}")


def _set_aside_checkpoints(directory: Path) -> None:
    """Rename the checkpoints of a run whose config.yaml is gone: a new run must not resume from them."""
    checkpoints, number = directory / "checkpoints", 1
    if checkpoints.exists() and not (directory / CONFIG_FILE).exists():
        while (aside := directory / f"checkpoints-before-{number}").exists():
            number += 1
        checkpoints.rename(aside)


def record_run(
    job: Job,
    data_fingerprint: str,
    tokenizer_fingerprint: str | None,
    data_change: Mapping[str, Any] | None = None,
) -> TrainingRecord:
    """Return what the run is going to be trained on; a resumed run keeps the history of what it was.

    `data_change` is what `check_same_data` has returned. UserError where the newest checkpoint's
    training.yaml is damaged.
    """
    load, fingerprints = job.config.checkpoint.load, (data_fingerprint, tokenizer_fingerprint)
    if not job.config.run.resume:
        weights = weights_identity(load) if load else None
        return TrainingRecord.of_run(job.config, *fingerprints, weights)
    newest = newest_checkpoint(job.run_dir)
    before = training_record(newest) if newest else None
    weights = read_environment(job.run_dir).get("weights") or (before.weights if before else None)
    if load and weights is None:
        weights = _identity_if_there(load)
    changes = [*(before.data_changes if before else []), *([dict(data_change)] if data_change else [])]
    past_stretches = before.history if before else []
    found = TrainingRecord.of_run(job.config, *fingerprints, weights, past_stretches, changes)
    if before is None or before.step == 0:
        return found
    past = before.convergence or convergence_hash(before.config, *fingerprints, weights)
    if found.convergence == past:
        return found
    history = [*before.history, {"step": before.step, "convergence": past}]
    return TrainingRecord.of_run(job.config, *fingerprints, weights, history, changes)


def _identity_if_there(load: str) -> str:
    """Return the identity of weights that a run of older code began with, which may be gone."""
    try:
        return weights_identity(load)
    except UserError:
        return "unknown"


def write_run_files(
    job: Job, data: Mapping[str, Any], record: TrainingRecord, data_record: DataRecord | None = None
) -> None:
    """Write the files that describe this run; config.yaml comes last and makes the directory a run.

    `data` are the counts of the data, `data_record` is what it consists of.
    """
    directory = job.run_dir
    if data_record is not None and record.data_fingerprint is not None:
        file = _data_file(directory, record.data_fingerprint)
        file.parent.mkdir(exist_ok=True)
        data_record.write(file)
    overrides = yaml.safe_dump(absolute_paths(job.overrides), sort_keys=False, allow_unicode=True)
    write_text(directory / OVERRIDES_FILE, overrides)
    write_text(directory / ENVIRONMENT_FILE, json.dumps(environment(job, data, record), indent=1) + "\n")
    write_text(directory / "plan.txt", format_plan(job.plan) + "\n")
    config = yaml.safe_dump(record.config, sort_keys=False, allow_unicode=True)
    write_text(directory / CONFIG_FILE, config)


def read_origin(directory: Path) -> dict[str, Any]:
    """Return the overrides and the git commit that a run has stored, for its logger."""
    overrides = read_yaml(directory / OVERRIDES_FILE)
    return {"overrides": overrides, "git_commit": read_environment(directory).get("git_commit")}


def check_same_run(config: Config, directory: Path) -> None:
    """Raise UserError where a resume in `directory` would make another run of it.

    The weights belong to one model and tokenizer, the place in the data to one order of the rows.
    """
    file, typed = directory / CONFIG_FILE, flatten(to_yaml(config))
    stored = read_stored_values(file)
    if "model.dim" not in stored:
        raise UserError(f"resume={directory}: {CONFIG_FILE} holds no model; is it a run directory?")
    check_stored_targets(file, stored, typed, config.run.allow_targets)
    for key, now in typed.items():
        fixed = any(key == each or key.startswith(f"{each}.") for each in _FIXED)
        if fixed and kind(key) is Kind.learnt and key in stored and stored[key] != now:
            raise UserError(
                f"resume={directory} has {key}={stored[key]}, not {now}: a run keeps its model and its data; "
                "checkpoint.load= starts a new one from its weights"
            )
    steps = complete_steps(directory)
    if steps:
        check_newest(steps[-1])
    if steps and (file := steps[-1] / MODEL_FILE).exists():
        model = {f"model.{key}": value for key, value in read_stored_values(file).items()}
        check_stored_targets(file, model, typed, config.run.allow_targets)
    done = step_number(steps[-1]) if steps else 0
    if config.train.steps < done:
        raise UserError(
            f"train.steps={config.train.steps} is less than resume={directory} has done: use {done} or more"
        )


def check_same_data(
    fingerprint: str, record: DataRecord | None, directory: Path, allow_change: bool = False
) -> dict[str, Any] | None:
    """Compare the data with the data that the run in `directory` was trained on.

    Args:
        record: what the data consists of now.
        allow_change: data.allow_change.

    Returns:
        None for the same data; else an entry of TrainingRecord.data_changes, where the change is allowed.

    Raises:
        UserError: it is other data; with what changed and what that means.
    """
    newest = newest_checkpoint(directory)
    before = training_record(newest) if newest else run_record(directory)
    step, stored = (before.step if before else 0), (before.data_fingerprint if before else None)
    if stored is None:
        path = directory / ENVIRONMENT_FILE
        raise UserError(f"{path} has no fingerprint of the data; is it a run directory?")
    if stored == fingerprint:
        return None
    change = DataChange.between(DataRecord.read(_data_file(directory, stored)), record)
    if not allow_change:
        done = f"was trained on other data up to step {step:,}" if step else "was begun on other data"
        raise UserError(
            f"resume={directory} {done} (fingerprint {stored}, now {fingerprint}): {change.told}; "
            f"{change.effect(step)}\n"
            "give the data as it was, or go on knowingly, which the run records: data.allow_change=true"
        )
    entry = {"step": step, "from": stored, "to": fingerprint}
    return entry | {"what": change.told, "effect": change.effect(step)}


def data_recorded_at(directory: Path) -> float:
    """Return when a run has noted what its data is, in seconds of the epoch; inf where it has not."""
    return max((path.stat().st_mtime for path in (directory / DATA_DIR).glob("*.json")), default=math.inf)


def _data_file(directory: Path, fingerprint: str) -> Path:
    """Return the file of a run that says what the data of a fingerprint consisted of."""
    return directory / DATA_DIR / f"{fingerprint}.json"


def environment(job: Job, data: Mapping[str, Any], record: TrainingRecord) -> dict[str, Any]:
    """Return versions, git commit, hardware, how the run was composed and what it learns from."""
    return {
        **environment_here(job),
        "convergence": record.convergence,
        "weights": record.weights,
        "data": {
            "fingerprint": record.data_fingerprint,
            "tokenizer_fingerprint": record.tokenizer_fingerprint,
            "row_order": record.row_order,
            "changes": record.data_changes,
            **data,
        },
        "choices": job.choices,
        "config_dirs": job.config_dirs,
        "filled_in": sorted(job.reasons),
    }


def environment_here(job: Job) -> dict[str, Any]:
    """Return what this machine, its packages and this code are; task=replay compares it."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in _PACKAGES},
        "git_commit": git_commit(),
        "hardware": asdict(job.hardware),
        "processor": _processor(),
        "threads": cpu_threads(int(os.environ.get("LOCAL_WORLD_SIZE", "1")), os.environ),
        "world_size": job.plan.world_size,
    }


def _processor() -> str | None:
    """Return the model of this machine's processor, by which libraries choose how they sum."""
    try:
        with open_file(Path("/proc/cpuinfo")) as file:
            lines = [line.decode(errors="replace") for line in islice(file, _CPUINFO_LINES)]
    except (OSError, UserError):
        return None
    pairs = (line.partition(":") for line in lines)
    return next((value.strip() for name, _, value in pairs if name.strip() == "model name"), None)


def read_environment(directory: Path) -> dict[str, Any]:
    """Return what environment.json of a run says; nothing where it cannot be read."""
    try:
        stored = read_json(directory / ENVIRONMENT_FILE, "listing")
    except BadFile:
        return {}
    return stored if isinstance(stored, dict) else {}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def git_commit() -> str | None:
    """Return the commit of this source tree, with `+changes` where files differ from it; None outside git."""
    root = Path(__file__).resolve().parent
    try:
        with phase("asking git for the commit"):
            commit = _git(root, "rev-parse", "HEAD")
            return commit + (
                "+changes" if _git(root, "status", "--porcelain", "--untracked-files=no") else ""
            )
    except (OSError, subprocess.SubprocessError):
        return None


def _git(root: Path, *arguments: str) -> str:
    command = ["git", "-C", str(root), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
