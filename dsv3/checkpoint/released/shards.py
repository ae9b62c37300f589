"""Finds the tensors of a directory of safetensors files, with or without an index."""

import os
from collections.abc import Iterable
from pathlib import Path

from dsv3.checkpoint.released.shard_file import ShardFile
from dsv3.checkpoint.released.shard_header import LIMIT, json_object, read_header
from dsv3.checkpoint.released.stored_tensor import StoredTensor, fault, quoted

INDEX = "model.safetensors.index.json"

_SUFFIX = ".safetensors"
_ONE_REVISION = "take the index and the files from one revision"


def open_shards(directory: Path) -> dict[str, StoredTensor]:
    """The tensors of a checkpoint by name, in the order in which they lie in its files.

    An index says which files there are, and must agree with them; without one, all .safetensors files
    count. UserError names the file and the tensor of whatever is wrong with them.
    """
    present = _listed(directory)
    if INDEX not in present:
        files = sorted(name for name in present if name.endswith(_SUFFIX) and not name.startswith("."))
        if not files:
            raise fault(directory, "holds no .safetensors files")
        return _collect(directory, files)
    weight_map = _read_index(directory / INDEX)
    for name, file in weight_map.items():
        if file not in present:
            raise fault(directory / INDEX, f"maps {quoted(name)} to {quoted(file)}, which is not there")
    tensors = _collect(directory, sorted(set(weight_map.values())))
    _check_index(directory / INDEX, weight_map, tensors)
    return tensors


def _listed(directory: Path) -> set[str]:
    try:
        return set(os.listdir(directory))  # noqa: PTH208 (names are what the index has)
    except OSError as error:
        raise fault(directory, f"cannot be read as a directory: {error.strerror}") from None


def _collect(directory: Path, files: Iterable[str]) -> dict[str, StoredTensor]:
    tensors: dict[str, StoredTensor] = {}
    for file in files:
        for tensor in read_header(ShardFile(directory / file)):
            if tensor.name in tensors:
                other = quoted(tensors[tensor.name].file.name)
                raise fault(tensor.file, f"has {quoted(tensor.name)}, which {other} has as well: remove one")
            tensors[tensor.name] = tensor
    return tensors


def _read_index(path: Path) -> dict[str, str]:
    """The files by tensor as an index names them."""
    file = ShardFile(path)
    if file.size > LIMIT:
        raise fault(path, f"has {file.size} bytes, an index may have {LIMIT}")
    raw = bytearray(file.size)
    file.read(memoryview(raw), 0, "the index")
    weight_map = json_object(path, bytes(raw), "index").get("weight_map", ...)
    if weight_map is ...:
        raise fault(path, "has no 'weight_map', which says where each tensor is")
    if not isinstance(weight_map, dict) or not weight_map:
        raise fault(path, f"has weight_map={quoted(weight_map)} instead of files by tensor")
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or not _is_plain(shard):
            what = f"a plain file name that ends with {_SUFFIX}"
            raise fault(path, f"maps {quoted(name)} to {quoted(shard)} instead of {what}")
    return weight_map


def _is_plain(name: str) -> bool:
    """Whether this names a file beside the index; links are for the file system to follow."""
    return name.endswith(_SUFFIX) and name.isprintable() and "/" not in name and "\\" not in name


def _check_index(path: Path, weight_map: dict[str, str], tensors: dict[str, StoredTensor]) -> None:
    for name, file in weight_map.items():
        if name not in tensors:
            raise fault(path, f"maps {quoted(name)} to {quoted(file)}, which lacks it: {_ONE_REVISION}")
        actual = tensors[name].file.name
        if actual != file:
            text = f"maps {quoted(name)} to {quoted(file)}, but it is in {quoted(actual)}"
            raise fault(path, f"{text}: {_ONE_REVISION}")
    for name, tensor in tensors.items():
        if name not in weight_map:
            text = f"leaves out {quoted(name)}, which is in {quoted(tensor.file.name)}"
            raise fault(path, f"{text}: {_ONE_REVISION}")
