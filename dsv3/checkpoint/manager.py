"""Saves and restores a training run: model, optimizer, progress and random state."""

import shutil
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
import yaml
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.tensor import DTensor

from dsv3.checkpoint.directory import (
    MODEL_FILE,
    TOKENIZER_DIR,
    Progress,
    commit,
    complete_steps,
    prepare_partial,
    remove,
    step_directory,
    sweep_leftovers,
    write_text,
)
from dsv3.checkpoint.matching import expected_tensors
from dsv3.checkpoint.reader import load_tensors, read_metadata
from dsv3.config import plain
from dsv3.model.config import ModelConfig
from dsv3.model.transformer import Transformer
from dsv3.runtime.distributed import Worker
from dsv3.runtime.errors import RunFailed, UserError

Parts = Sequence[Transformer]
"""What a rank has of the model: all of it, or some stages of a pipeline."""


class CheckpointManager:
    """The checkpoints of one run; every method is called by all ranks together."""

    def __init__(self, run_dir: Path, keep_last: int, worker: Worker) -> None:
        self.run_dir = run_dir
        self.keep_last = keep_last
        self.worker = worker
        self.newest: Path | None = None
        """The checkpoint this process has restored or saved last."""
        if worker.is_main:
            sweep_leftovers(run_dir)

    def save(self, parts: Parts, optimizer: torch.optim.Optimizer, progress: Progress) -> Path:
        """Write the state after `progress.step`; it appears under its name only when complete."""
        directory = step_directory(self.run_dir, progress.step)
        if directory == self.newest:
            return directory  # nothing has been trained since
        tensors = {
            **_first(_model_state(parts)),
            **_first(_optimizer_state(parts, optimizer)),
            **self._random_state(),
        }
        self._require_finite(tensors, progress.step)
        partial = directory.with_name(f".partial-{directory.name}")
        if self.worker.is_main:
            prepare_partial(directory)
        self.worker.barrier()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # DCP remarks that one process is no process group
            save(tensors, storage_writer=FileSystemWriter(partial))
        if self.worker.is_main:
            self._describe(partial, parts[0].config, progress)
            commit(partial, directory)
            for old in complete_steps(self.run_dir)[: -self.keep_last]:
                remove(old)
        self.worker.barrier()
        self.newest = directory
        return directory

    def restore(self, parts: Parts, optimizer: torch.optim.Optimizer) -> Progress | None:
        """Load the newest complete checkpoint into model and optimizer; None where there is none."""
        steps = complete_steps(self.run_dir)
        directory = self.worker.share(steps[-1] if steps else None)
        if directory is None:
            return None
        _make_state(optimizer)
        random_state = self._random_state()
        # A layout with more ranks than before has no stored random state for the new ones.
        stored = read_metadata(directory).state_dict_metadata
        random_state = {name: state for name, state in random_state.items() if name in stored}
        _load(directory, [*_model_state(parts), *_optimizer_state(parts, optimizer), *random_state.items()])
        for state in random_state.values():
            torch.set_rng_state(state)
        self.newest = directory
        return Progress.read(directory)

    def _require_finite(self, tensors: dict[str, Tensor], step: int) -> None:
        """RunFailed where a number to be saved is none: a loss tells of it only one step later."""
        bad = [name for name, tensor in tensors.items() if not bool(_local(tensor).isfinite().all())]
        if self.worker.any(bool(bad)):
            where = bad[0] if bad else "a tensor of another rank"
            raise RunFailed(
                f"after step {step} {where} is not finite, so it is not saved; the last checkpoint is from "
                "before. A lower optimizer.lr or longer warm-up may help."
            )

    def _describe(self, partial: Path, config: ModelConfig, progress: Progress) -> None:
        write_text(partial / MODEL_FILE, yaml.safe_dump(plain(config), sort_keys=False))
        progress.write(partial)
        tokenizer = self.run_dir / TOKENIZER_DIR
        if tokenizer.exists():
            shutil.copytree(tokenizer, partial / TOKENIZER_DIR)

    def _random_state(self) -> dict[str, Tensor]:
        return {f"random.{self.worker.rank}": torch.get_rng_state()}


def load_weights(parts: Parts, directory: Path) -> None:
    """Load the weights alone, from a step of a run or a converted checkpoint.

    UserError where it holds weights that this model has no place for; MTP layers may be left out.
    """
    config = parts[0].config
    known = expected_tensors(config)
    left_out = "model.mtp." if not config.mtp_depths else ()
    for name in read_metadata(directory).state_dict_metadata:
        if name.startswith("model.") and name not in known and not name.startswith(left_out):
            raise UserError(f"{directory} has '{name}', the model does not: it was saved from another model")
    _load(directory, _model_state(parts))


def _load(directory: Path, wanted: Iterable[tuple[str, Tensor]]) -> None:
    """Fill tensors in place by name; of one that is here twice, as an embedding in two stages, both."""
    wanted = list(wanted)
    once = _first(wanted)
    load_tensors(directory, once)
    for name, tensor in wanted:
        if tensor is not once[name]:
            _local(tensor).copy_(_local(once[name]))


def _first(named: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for name, tensor in named:
        tensors.setdefault(name, tensor)
    return tensors


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _model_state(parts: Parts) -> list[tuple[str, Tensor]]:
    return [(f"model.{name}", tensor) for part in parts for name, tensor in part.state_dict().items()]


def _optimizer_state(parts: Parts, optimizer: torch.optim.Optimizer) -> list[tuple[str, Tensor]]:
    """The optimizer's tensors by name; its hyperparameters come from the config, not from a file."""
    named = [(name, parameter) for part in parts for name, parameter in part.named_parameters()]
    return [
        (f"optimizer.state.{name}.{key}", value)
        for name, parameter in named
        for key, value in optimizer.state[parameter].items()
        if isinstance(value, Tensor)
    ]


def _make_state(optimizer: torch.optim.Optimizer) -> None:
    """Let the optimizer make its tensors, by a step that moves nothing; they are overwritten then."""
    rates = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
