"""The run directory: who may write into it, the files that describe the run, and the checks of a resume.

What a run has stored is read as data; nothing is built from it.
"""

import importlib.metadata
import json
import platform
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from dsv3.checkpoint.directory import MODEL_FILE, complete_steps, step_number, write_text
from dsv3.checkpoint.manifest import check_newest
from dsv3.config.overrides import absolute_paths
from dsv3.config.root import Config
from dsv3.config.strict import check_target, to_yaml
from dsv3.config.upgrade import upgrade_node
from dsv3.errors import UserError
from dsv3.launch.job import Job
from dsv3.planning.report import format_plan

CONFIG_FILE, OVERRIDES_FILE, ENVIRONMENT_FILE = "config.yaml", "overrides.yaml", "environment.json"

_KEPT = ("data._target_", "data.held_out", "data.shuffle", "train.seed", "train.sequence_length")
"""Keys that a run keeps beside model and tokenizer: they decide which rows there are, and their order."""

_PACKAGES = ("dsv3", "torch", "hydra-core", "omegaconf", "numpy", "tokenizers", "safetensors", "wandb")


def read_stored_values(file: Path) -> dict[str, Any]:
    """Return the values of a stored YAML file by their dotted keys, with today's names.

    UserError where the file holds no config.
    """
    try:
        node = upgrade_node(yaml.safe_load(file.read_text()))
        if not isinstance(node, dict):
            raise TypeError
        return flatten(node)
    except (OSError, ValueError, yaml.YAMLError, TypeError, RecursionError):
        raise UserError(f"{file} holds no config; is it a run directory?") from None


def flatten(node: Any, path: str = "") -> dict[str, Any]:
    """Return the leaves of nested dicts, and of dicts in lists, by their dotted keys."""
    leaves: dict[str, Any] = {}
    for key, value in node.items() if isinstance(node, dict) else enumerate(node):
        nested = isinstance(value, list) and any(isinstance(item, dict | list) for item in value)
        inner = nested or isinstance(value, dict)
        leaves |= flatten(value, f"{path}{key}.") if inner else {f"{path}{key}": value}
    return leaves


def check_stored_targets(
    file: Path, stored: Mapping[str, Any], checked: Mapping[str, Any], allow: Sequence[str]
) -> None:
    """Raise UserError for a `_target_` in `file` that may not be built, unless it is among `checked`.

    Nothing is built from stored files; but whoever planted a class there may have planted more.
    """
    for key, target in stored.items():
        if key.rpartition(".")[2] == "_target_" and target != checked.get(key):
            check_target(str(target), f"{file}: {key}", allow)


def check_run_dir(directory: Path, resume: bool) -> None:
    """Raise UserError unless the run may start in `directory`: an existing run can only be resumed."""
    if directory.exists() and not directory.is_dir():
        raise UserError(f"run.dir={directory} is a file: name a directory")
    if (directory / CONFIG_FILE).exists() and not resume:
        raise UserError(
            f"run.dir={directory} holds a run already: continue it with resume={directory} or name another"
        )


def make_run_dir(job: Job) -> Path:
    """Make the job's run directory; a default one that exists already gets a number behind its name."""
    directory, number = job.run_dir.absolute(), 1
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        while not job.named_run_dir:
            try:
                directory.mkdir()
                return directory
            except FileExistsError:
                number += 1
                directory = directory.with_name(f"{job.run_dir.name}_{number}")
        directory.mkdir(exist_ok=True)
        _set_aside_checkpoints(directory)
    except OSError as error:
        raise UserError(f"run.dir={directory} cannot be made: {error.strerror}") from None
    return directory


def _set_aside_checkpoints(directory: Path) -> None:
    """Rename the checkpoints of a run whose config.yaml is gone: a new run must not resume from them."""
    checkpoints, number = directory / "checkpoints", 1
    if checkpoints.exists() and not (directory / CONFIG_FILE).exists():
        while (aside := directory / f"checkpoints-before-{number}").exists():
            number += 1
        checkpoints.rename(aside)


def write_run_files(job: Job, data: dict[str, Any]) -> None:
    """Write the files that describe this run; config.yaml comes last and makes the directory a run."""
    directory = job.run_dir
    overrides = yaml.safe_dump(absolute_paths(job.overrides), sort_keys=False, allow_unicode=True)
    write_text(directory / OVERRIDES_FILE, overrides)
    write_text(directory / ENVIRONMENT_FILE, json.dumps(environment(job, data), indent=1) + "\n")
    write_text(directory / "plan.txt", format_plan(job.plan) + "\n")
    write_text(
        directory / CONFIG_FILE, yaml.safe_dump(to_yaml(job.config), sort_keys=False, allow_unicode=True)
    )


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
        kept = key in _KEPT or key.startswith(("model.", "tokenizer."))
        if kept and key in stored and stored[key] != now:
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


def check_same_data(fingerprint: str, directory: Path) -> None:
    """Raise UserError where the data is not the data that the run in `directory` was trained on."""
    path = directory / ENVIRONMENT_FILE
    try:
        stored = json.loads(path.read_text())["data"]["fingerprint"]
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{path} has no fingerprint of the data; is it a run directory?") from None
    if stored != fingerprint:
        raise UserError(
            f"resume={directory} was trained on data with the fingerprint {stored}, it is {fingerprint} now: "
            "give that data (data.path=...), or start a new run from the weights with checkpoint.load="
        )


def environment(job: Job, data: dict[str, Any]) -> dict[str, Any]:
    """Return versions, git commit, hardware and the data's fingerprint, for environment.json."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in _PACKAGES},
        "git_commit": _git_commit(),
        "hardware": asdict(job.hardware),
        "world_size": job.plan.world_size,
        "data": data,
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git_commit() -> str | None:
    """Return the commit of this source tree, with `+changes` where files differ from it; None outside git."""
    root = Path(__file__).resolve().parent
    try:
        commit = _git(root, "rev-parse", "HEAD")
        return commit + ("+changes" if _git(root, "status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _git(root: Path, *arguments: str) -> str:
    command = ["git", "-C", str(root), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
