"""Whether a checkpoint holds the weights of a model, by its metadata and without memory for either.

The weights alone, from a step of a run, a converted checkpoint or a released one, on any layout.
"""

import warnings
from collections.abc import Callable, Iterable
from contextlib import closing
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_loader import load

from dsv3.checkpoint.dcp_metadata import load_tensors, read_metadata, require_tensors
from dsv3.checkpoint.directory import is_released
from dsv3.checkpoint.state import Parts, first, local, model_state
from dsv3.config.model import ModelConfig
from dsv3.config.strict import build
from dsv3.errors import UserError
from dsv3.hf.pread_file import PreadFile
from dsv3.hf.storage_reader import HFSource, HFStorageReader


def require_weights(config: ModelConfig, directory: Path) -> None:
    """UserError that names the first of the model's tensors that `directory` has not, or in another shape."""
    if is_released(directory):
        return  # the reader compares all headers with the model before it reads
    require_tensors(directory, read_metadata(directory), expected_tensors(config))


def expected_tensors(config: ModelConfig) -> dict[str, Tensor]:
    """What a checkpoint of the whole model holds, by name, on the meta device."""
    with torch.device("meta"):
        model = build(config)
    return {f"model.{name}": tensor for name, tensor in model.state_dict().items()}


def parameter_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The shapes of the whole model's parameters and biases, by the model's own names."""
    return {
        name.removeprefix("model."): tuple(tensor.shape) for name, tensor in expected_tensors(config).items()
    }


_PREFIX = "model."


def load_weights(parts: Parts, directory: Path) -> None:
    """Load the weights of a model whose parts are on all ranks; the ranks call it together.

    UserError where the checkpoint holds weights that this model has no place for, or lacks some; its MTP
    layers may be left out.
    """
    config = parts[0].config
    if is_released(directory):
        with closing(open_released(directory, config)) as source:
            fill(model_state(parts), lambda tensors: _load_released(source, tensors))
        return
    known = expected_tensors(config)
    left_out = f"{_PREFIX}mtp." if not config.mtp_depths else ()
    for name in read_metadata(directory).state_dict_metadata:
        if name.startswith(_PREFIX) and name not in known and not name.startswith(left_out):
            raise UserError(f"{directory} has '{name}', the model does not: it was saved from another model")
    fill(model_state(parts), lambda tensors: load_tensors(directory, tensors))


def open_released(directory: Path, config: ModelConfig, kind: type[PreadFile] = PreadFile) -> HFSource:
    """The weights of a released checkpoint, checked by their headers against the model; to be closed."""
    return HFSource(directory, config, parameter_shapes(config), kind)


def fill(wanted: Iterable[tuple[str, Tensor]], read: Callable[[dict[str, Tensor]], None]) -> None:
    """Fill tensors in place by name; of one that is here twice, as an embedding in two stages, both."""
    wanted = list(wanted)
    once = first(wanted)
    read(once)
    for name, tensor in wanted:
        if tensor is not once[name]:
            local(tensor).copy_(local(once[name]))


def _load_released(source: HFSource, tensors: dict[str, Tensor]) -> None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # DCP remarks that one process is no process group
            load(dict(tensors), storage_reader=HFStorageReader(source))
    except CheckpointException as error:
        causes = [cause for cause, _ in error.failures.values() if isinstance(cause, UserError)]
        raise (causes[0] if causes else error) from None
