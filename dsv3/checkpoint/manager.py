"""Saves and restores a training run: model, optimizer, progress and random state."""

import shutil
import warnings
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
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
from dsv3.checkpoint.reader import load_tensors, read_metadata
from dsv3.config import plain
from dsv3.model.transformer import Transformer
from dsv3.runtime.distributed import Worker
from dsv3.runtime.errors import RunFailed, UserError

_FLAT = StateDictOptions(flatten_optimizer_state_dict=True)


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

    def save(self, model: Transformer, optimizer: torch.optim.Optimizer, progress: Progress) -> Path:
        """Write the state after `progress.step`; it appears under its name only when complete."""
        directory = step_directory(self.run_dir, progress.step)
        if directory == self.newest:
            return directory  # nothing has been trained since
        tensors = {**_model_state(model), **_optimizer_state(model, optimizer), **self._random_state()}
        self._require_finite(tensors, progress.step)
        partial = directory.with_name(f".partial-{directory.name}")
        if self.worker.is_main:
            prepare_partial(directory)
        self.worker.barrier()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # DCP remarks that one process is no process group
            save(tensors, storage_writer=FileSystemWriter(partial))
        if self.worker.is_main:
            self._describe(partial, model, progress)
            commit(partial, directory)
            for old in complete_steps(self.run_dir)[: -self.keep_last]:
                remove(old)
        self.worker.barrier()
        self.newest = directory
        return directory

    def restore(self, model: Transformer, optimizer: torch.optim.Optimizer) -> Progress | None:
        """Load the newest complete checkpoint into model and optimizer; None where there is none."""
        steps = complete_steps(self.run_dir)
        directory = self.worker.share(steps[-1] if steps else None)
        if directory is None:
            return None
        optimizer_state = _optimizer_state(model, optimizer)
        random_state = self._random_state()
        # A layout with more ranks than before has no stored random state for the new ones.
        stored = read_metadata(directory).state_dict_metadata
        random_state = {name: state for name, state in random_state.items() if name in stored}
        load_tensors(directory, {**_model_state(model), **optimizer_state, **random_state})
        _set_optimizer_state(model, optimizer, optimizer_state)
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

    def _describe(self, partial: Path, model: Transformer, progress: Progress) -> None:
        write_text(partial / MODEL_FILE, yaml.safe_dump(plain(model.config), sort_keys=False))
        progress.write(partial)
        tokenizer = self.run_dir / TOKENIZER_DIR
        if tokenizer.exists():
            shutil.copytree(tokenizer, partial / TOKENIZER_DIR)

    def _random_state(self) -> dict[str, Tensor]:
        return {f"random.{self.worker.rank}": torch.get_rng_state()}


def load_weights(model: Transformer, directory: Path) -> None:
    """Load the weights alone, from a step of a run or a converted checkpoint.

    UserError where it holds weights that this model has no place for; MTP layers may be left out.
    """
    wanted = _model_state(model)
    left_out = "model.mtp." if not model.mtp else ()
    for name in read_metadata(directory).state_dict_metadata:
        if name.startswith("model.") and name not in wanted and not name.startswith(left_out):
            raise UserError(f"{directory} has '{name}', the model does not: it was saved from another model")
    load_tensors(directory, wanted)


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _model_state(model: Transformer) -> dict[str, Tensor]:
    return {f"model.{name}": tensor for name, tensor in model.state_dict().items()}


def _optimizer_state(model: Transformer, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's tensors by name; its hyperparameters come from the config, not from a file."""
    flat: dict[str, Any] = get_optimizer_state_dict(model, optimizer, options=_FLAT)
    return {f"optimizer.{name}": value for name, value in flat.items() if isinstance(value, Tensor)}


def _set_optimizer_state(
    model: Transformer, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]
) -> None:
    flat: dict[str, Any] = get_optimizer_state_dict(model, optimizer, options=_FLAT)
    flat.update({name.removeprefix("optimizer."): value for name, value in tensors.items()})
    set_optimizer_state_dict(model, optimizer, flat, options=_FLAT)
