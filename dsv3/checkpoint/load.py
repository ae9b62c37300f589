"""Load the weights alone, from a step of a run, a converted checkpoint or an HF checkpoint, on any layout.

Checks whether a checkpoint holds the weights of a model need its metadata alone, and no memory for weights.
"""

import sys
import warnings
from collections.abc import Callable, Container, Iterable
from contextlib import closing
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed import get_rank, is_initialized
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load

from dsv3.checkpoint.agreement import together
from dsv3.checkpoint.dcp_metadata import (
    load_tensors,
    loading,
    read_metadata,
    require_tensors,
    user_error,
)
from dsv3.checkpoint.directory import MODEL_FILE, is_hf_checkpoint
from dsv3.checkpoint.state import ModelParts, local_tensor, model_state, unique_by_name
from dsv3.config.model import ModelConfig
from dsv3.config.strict import build
from dsv3.distributed.process_group import RankContext
from dsv3.errors import UserError
from dsv3.hf.names import MODEL_PREFIX, SCALE_SUFFIX
from dsv3.hf.pread_file import PreadFile
from dsv3.hf.safetensors_reader import read_headers
from dsv3.hf.storage_reader import HFSource, HFStorageReader


def require_weights(config: ModelConfig, directory: Path) -> None:
    """Raise UserError with the first of the model's tensors that is missing or of another shape."""
    if is_hf_checkpoint(directory):
        return  # the reader compares all headers with the model before it reads
    require_tensors(directory, read_metadata(directory), expected_tensors(config))


def expected_tensors(config: ModelConfig) -> dict[str, Tensor]:
    """Return the tensors that a checkpoint of the whole model holds, by name, on the meta device."""
    with torch.device("meta"):
        model = build(config)
    return {MODEL_PREFIX + name: tensor for name, tensor in model.state_dict().items()}


def stored_weights(directory: Path) -> str:
    """Return the narrowest number format, such as bf16, in which a checkpoint stores a matrix."""
    if is_hf_checkpoint(directory):
        dtypes = [
            entry.dtype
            for name, entry in read_headers(directory).items()
            if len(entry.shape) > 1 and not name.endswith(SCALE_SUFFIX)
        ]
    else:
        dtypes = [
            entry.properties.dtype
            for name, entry in read_metadata(directory).state_dict_metadata.items()
            if name.startswith(MODEL_PREFIX)
            and isinstance(entry, TensorStorageMetadata)
            and len(entry.size) > 1
        ]
    names = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.float8_e4m3fn: "fp8"}
    narrowest = min(dtypes, key=lambda dtype: dtype.itemsize)
    return names.get(narrowest, str(narrowest))


def parameter_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the whole model's parameters and expert biases, by the model's own names."""
    return {
        name.removeprefix(MODEL_PREFIX): tuple(tensor.shape)
        for name, tensor in expected_tensors(config).items()
    }


def load_weights(model_parts: ModelParts, directory: Path, ranks: RankContext | None = None) -> None:
    """Load the weights of a model whose parts are spread over `ranks`, which call this together.

    UserError, on all ranks alike, where the checkpoint lacks weights of this model or holds others
    (require_no_others). Without `ranks` this process has the whole model.
    """
    if ranks is None:
        _load_own_weights(model_parts, directory)
    else:
        together(ranks, lambda: _load_own_weights(model_parts, directory))


def _load_own_weights(model_parts: ModelParts, directory: Path) -> None:
    """Load this rank's weights; nothing is exchanged with other ranks."""
    config = model_parts[0].config
    if is_hf_checkpoint(directory):
        with closing(open_hf_checkpoint(directory, config)) as source:
            fill(directory, model_state(model_parts), lambda tensors: _load_hf_tensors(source, tensors))
        return
    metadata = read_metadata(directory)
    stored = metadata.state_dict_metadata
    require_no_others(config, directory, stored, expected_tensors(config))
    fill(directory, model_state(model_parts), lambda tensors: load_tensors(directory, tensors, metadata))


def require_no_others(
    config: ModelConfig, directory: Path, stored: Iterable[str], known: Container[str]
) -> None:
    """Raise UserError for a model's tensor among those `stored` in a DCP that is not among the `known` ones.

    The last layers, main or MTP, may be left out: the command has asked for fewer by name, compared with
    model.yaml (config/model_difference.py). Without that file nothing was compared, and MTP layers alone may
    be left out, all together.
    """
    described = (directory / MODEL_FILE).is_file()
    for name in stored:
        if not name.startswith(MODEL_PREFIX) or name in known:
            continue
        kind, _, rest = name.removeprefix(MODEL_PREFIX).partition(".")
        last = {"layers": config.num_layers, "mtp": config.mtp_depths}.get(kind)
        number = rest.partition(".")[0]
        left_out = last is not None and number.isdecimal() and int(number) >= last
        if not (left_out and (described or (kind, last) == ("mtp", 0))):
            raise UserError(f"{directory} has '{name}', the model does not: it was saved from another model")


def open_hf_checkpoint(directory: Path, config: ModelConfig, kind: type[PreadFile] = PreadFile) -> HFSource:
    """Open the weights of an HF checkpoint, their headers checked against the model; the caller closes it.

    Rank 0 tells what is read although no release is so: a recast, a padded vocabulary, keys passed over.
    """
    source = HFSource(directory, config, parameter_shapes(config), kind)
    if not is_initialized() or get_rank() == 0:
        for note in source.notes:
            print(note, file=sys.stderr)
    return source


@torch.no_grad()
def fill(
    directory: Path, wanted: Iterable[tuple[str, Tensor]], read: Callable[[dict[str, Tensor]], None]
) -> None:
    """Fill tensors in place by name; of a name wanted twice (an embedding in two stages) both.

    Before they are read all values are nan. UserError for a tensor in which one still is: nothing that a
    load leaves out passes for a weight, or for the state of an optimizer.
    """
    wanted = list(wanted)
    once = unique_by_name(wanted)
    values = {name: local_tensor(tensor) for name, tensor in once.items()}
    values = {name: value for name, value in values.items() if value.is_floating_point() and value.numel()}
    for value in values.values():
        value.fill_(torch.nan)
    read(once)
    for name, value in values.items():
        if bool(value.amin().isnan()):  # nan is the least; unlike isnan() this takes no memory
            raise UserError(f"{directory} leaves values of '{name}' unset: not all of it is stored there")
    for name, tensor in wanted:
        if tensor is not once[name]:
            local_tensor(tensor).copy_(local_tensor(once[name]))


def _load_hf_tensors(source: HFSource, tensors: dict[str, Tensor]) -> None:
    """Fill tensors in place through DCP, on this rank alone.

    Raises the UserError of what failed, not DCP's wrapper of it.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # DCP remarks that one process is no process group
            with loading(source.directory) as planner:
                load(dict(tensors), storage_reader=HFStorageReader(source), planner=planner, no_dist=True)
    except CheckpointException as error:
        raise (user_error(error) or error) from None
