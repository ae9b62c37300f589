import gc
import os
import pickle
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path, PosixPath
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, ChunkStorageMetadata, Metadata
from torch.distributed.checkpoint.state_dict_saver import save

from dsv3.checkpoint import dcp_metadata
from dsv3.checkpoint.dcp_metadata import load_tensors, read_metadata
from dsv3.checkpoint.metadata_pickle import load_records
from dsv3.errors import UserError
from tests.checkpoint import hostile

VALUES = {"a": torch.arange(12.0).reshape(3, 4), "b": torch.tensor(7, dtype=torch.int64)}
ATTACKS = sorted(hostile.attacks(""))


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """Write a DCP directory that holds VALUES, and `note`, which is no tensor."""
    state = {**VALUES, "note": {"text": "bytes"}}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        save(state, storage_writer=FileSystemWriter(tmp_path / "dcp"))
    return tmp_path / "dcp"


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    """Return the file that a hostile pickle makes if it gets to run."""
    return tmp_path / "executed"


def _targets() -> dict[str, torch.Tensor]:
    return {name: torch.full_like(tensor, -1) for name, tensor in VALUES.items()}


def _original(directory: Path) -> Metadata:
    metadata: Metadata = pickle.loads((directory / ".metadata").read_bytes())
    return metadata


def _change(directory: Path, change: Callable[[Metadata], object]) -> None:
    metadata = _original(directory)
    change(metadata)
    (directory / ".metadata").write_bytes(pickle.dumps(metadata))


def _all(metadata: Metadata, **values: Any) -> None:
    """Set fields of every entry of the storage."""
    for info in metadata.storage_data.values():
        for name, value in values.items():
            setattr(info, name, value)


def _refused(directory: Path) -> str:
    """Return the message of load_tensors, which must name the directory, in a line or two."""
    with pytest.raises(UserError) as caught:
        load_tensors(directory, _targets())
    message = str(caught.value)
    assert str(directory) in message
    assert len(message.splitlines()) <= 2
    assert "Traceback" not in message
    return message


def test_tensors_of_every_kind_are_read(directory: Path) -> None:
    targets = _targets()
    load_tensors(directory, targets)
    for name, value in VALUES.items():
        assert torch.equal(targets[name], value)


def test_metadata_equals_what_pickle_would_have_read(directory: Path) -> None:
    mine, original = read_metadata(directory), _original(directory)
    assert mine.state_dict_metadata == original.state_dict_metadata
    assert mine.storage_data == original.storage_data


def test_no_garbage_is_looked_for_among_millions_of_new_records(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    collects: list[bool] = []

    def watched(*arguments: Any) -> Any:
        collects.append(gc.isenabled())
        return load_records(*arguments)

    monkeypatch.setattr(dcp_metadata, "load_records", watched)
    read_metadata(directory)
    assert collects == [False]
    assert gc.isenabled()


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_every_protocol_since_2_is_read(directory: Path, protocol: int) -> None:
    (directory / ".metadata").write_bytes(pickle.dumps(_original(directory), protocol))
    load_tensors(directory, _targets())


@pytest.mark.parametrize("attack", ATTACKS)
def test_metadata_that_would_run_code_is_refused_and_runs_nothing(
    directory: Path, marker: Path, attack: str
) -> None:
    malicious, named = hostile.attacks(f"touch {marker}")[attack]
    (directory / ".metadata").write_bytes(malicious)
    message = _refused(directory)
    assert f"it names {named}, which no checkpoint needs" in message
    assert not marker.exists()


@pytest.mark.parametrize("attack", ATTACKS)
def test_the_attacks_are_real_to_pickle_itself(marker: Path, attack: str) -> None:
    malicious, _ = hostile.attacks(f"touch {marker}")[attack]
    pickle.loads(malicious)
    assert marker.exists()


def test_metadata_cannot_change_the_classes_it_names(directory: Path, tmp_path: Path) -> None:
    """The BUILD instruction can set attributes of a class: this switches off the check of paths."""
    outside = shutil.copy(directory / "__0_0.distcp", tmp_path / "outside")
    _change(directory, lambda metadata: _all(metadata, relative_path=str(outside)))
    benign = (directory / ".metadata").read_bytes()
    size = hostile.name("torch", "Size")
    nothing = pickle.EMPTY_TUPLE
    for module, name in [("pathlib", "PosixPath"), (BytesStorageMetadata.__module__, "Metadata")]:
        poison = hostile.set_attributes(hostile.name(module, name), is_absolute=size, parts=nothing)
        (directory / ".metadata").write_bytes(benign[:2] + poison + benign[2:])
        _refused(directory)
    assert "is_absolute" not in vars(PosixPath)
    assert "parts" not in vars(PosixPath)
    assert "parts" not in vars(Metadata)


@pytest.mark.parametrize("path", ["/etc/passwd", "../outside", "a/../../outside", "a/.."])
def test_a_path_out_of_the_directory_is_refused(directory: Path, path: str) -> None:
    shutil.copy(directory / "__0_0.distcp", directory.parent / "outside")
    _change(directory, lambda metadata: _all(metadata, relative_path=path))
    assert f"outside the directory, to {path}" in _refused(directory)


def test_a_linked_file_is_read_like_any_other(directory: Path) -> None:
    (directory / "__0_0.distcp").rename(directory.parent / "elsewhere")
    (directory / "__0_0.distcp").symlink_to("../elsewhere")
    targets = _targets()
    load_tensors(directory, targets)
    assert torch.equal(targets["a"], VALUES["a"])


class Harmful:
    """Pickles as a call of os.system."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (self.command,)


def _plant(directory: Path, payload: Any) -> None:
    """Replace every entry of the checkpoint by this object."""
    file = directory / "__0_0.distcp"
    torch.save(payload, file)
    size = file.stat().st_size
    _change(directory, lambda metadata: _all(metadata, offset=0, length=size))


def test_a_tensor_that_would_run_code_is_refused_and_runs_nothing(directory: Path, marker: Path) -> None:
    _plant(directory, Harmful(f"touch {marker}"))
    assert "something else than tensors" in _refused(directory)
    assert not marker.exists()
    torch.load(directory / "__0_0.distcp", weights_only=False)
    assert marker.exists()


def test_a_raw_pickle_in_place_of_a_tensor_runs_nothing(directory: Path, marker: Path) -> None:
    malicious = pickle.dumps(Harmful(f"touch {marker}"))
    (directory / "__0_0.distcp").write_bytes(malicious)
    _change(directory, lambda metadata: _all(metadata, offset=0, length=len(malicious)))
    assert "it is no archive of torch.save" in _refused(directory)
    assert not marker.exists()


def test_an_object_in_place_of_a_tensor_is_refused(directory: Path) -> None:
    _plant(directory, {"not": "a tensor"})
    _refused(directory)


def test_an_entry_of_bytes_is_never_loaded(directory: Path, marker: Path) -> None:
    """DCP would unpickle it; asked for by name it is no tensor, and unasked it stays untouched."""
    file = directory / "__0_0.distcp"
    good, malicious = file.read_bytes(), pickle.dumps(Harmful(f"touch {marker}"))
    file.write_bytes(good + malicious)

    def aim(metadata: Metadata) -> None:
        for index, info in metadata.storage_data.items():
            if index.fqn == "note":
                info.offset, info.length = len(good), len(malicious)

    _change(directory, aim)
    load_tensors(directory, _targets())
    with pytest.raises(UserError, match="no tensor 'note'"):
        load_tensors(directory, {"note": torch.zeros(1)})
    _change(directory, lambda metadata: metadata.state_dict_metadata.update(a=BytesStorageMetadata()))
    assert "no tensor 'a'" in _refused(directory)
    assert not marker.exists()


def test_a_missing_tensor_is_named(directory: Path) -> None:
    with pytest.raises(UserError, match="no tensor 'c': it was saved from another model"):
        load_tensors(directory, {**_targets(), "c": torch.zeros(2)})


def test_another_shape_is_named_with_both_sizes(directory: Path) -> None:
    with pytest.raises(UserError, match=r"'a' has shape \[3, 4\], the model needs \[4, 3\]"):
        load_tensors(directory, {"a": torch.zeros(4, 3)})


def _entry(metadata: Metadata, **values: Any) -> None:
    for name, value in values.items():
        setattr(metadata.state_dict_metadata["a"], name, value)


def _chunks(*parts: tuple[list[int], list[int]]) -> list[ChunkStorageMetadata]:
    return [ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes)) for offsets, sizes in parts]


@pytest.mark.parametrize(
    "chunks",
    [
        pytest.param([], id="none"),
        pytest.param(_chunks(([0, 0], [2, 4])), id="one missing"),
        pytest.param(_chunks(([0, 0], [2, 4]), ([1, 0], [1, 2])), id="too little"),
        pytest.param(_chunks(([1, 0], [3, 4])), id="beyond the end"),
        pytest.param(_chunks(([-1, 0], [3, 4])), id="before the beginning"),
        pytest.param(_chunks(([0], [12])), id="of another rank"),
    ],
)
def test_a_tensor_whose_parts_do_not_make_it_up_is_refused(
    directory: Path, chunks: list[ChunkStorageMetadata]
) -> None:
    """DCP would leave what is not covered as it was before the load."""
    _change(directory, lambda metadata: _entry(metadata, chunks=chunks))
    assert ".metadata is refused" in _refused(directory)


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda m: setattr(m, "state_dict_metadata", None), id="no entries"),
        pytest.param(lambda m: setattr(m, "state_dict_metadata", [1]), id="entries are a list"),
        pytest.param(lambda m: setattr(m, "storage_data", None), id="no storage"),
        pytest.param(lambda m: setattr(m, "storage_data", {}), id="empty storage"),
        pytest.param(lambda m: setattr(m, "storage_data", {1: 2}), id="storage of numbers"),
        pytest.param(lambda m: _all(m, relative_path=3), id="path is a number"),
        pytest.param(lambda m: _all(m, relative_path="\0"), id="path of a null byte"),
        pytest.param(lambda m: _all(m, relative_path=""), id="empty path"),
        pytest.param(lambda m: _all(m, offset=-1), id="negative offset"),
        pytest.param(lambda m: _all(m, offset=10**12), id="offset beyond the end"),
        pytest.param(lambda m: _all(m, length="a"), id="length is text"),
        pytest.param(lambda m: _entry(m, size="abc"), id="size is text"),
        pytest.param(lambda m: _entry(m, size=torch.Size([-3, 4])), id="negative size"),
        pytest.param(lambda m: _entry(m, properties=None), id="no properties"),
        pytest.param(lambda m: _entry(m, chunks=[3]), id="chunk is a number"),
    ],
)
def test_metadata_of_another_structure_is_refused(
    directory: Path, change: Callable[[Metadata], object]
) -> None:
    _change(directory, change)
    _refused(directory)


def test_metadata_that_is_no_metadata_is_refused(directory: Path) -> None:
    (directory / ".metadata").write_bytes(pickle.dumps([1, 2]))
    assert "it holds a list" in _refused(directory)


@pytest.mark.parametrize("part", [0.0, 0.01, 0.5, 0.999])
def test_truncated_metadata_is_refused(directory: Path, part: float) -> None:
    content = (directory / ".metadata").read_bytes()
    (directory / ".metadata").write_bytes(content[: int(len(content) * part)])
    assert ".metadata is refused" in _refused(directory)


@pytest.mark.parametrize("part", [0.0, 0.01, 0.5])
def test_a_truncated_file_of_tensors_is_told(directory: Path, part: float) -> None:
    content = (directory / "__0_0.distcp").read_bytes()
    (directory / "__0_0.distcp").write_bytes(content[: int(len(content) * part)])
    assert "cannot be read, it may be damaged" in _refused(directory)


def test_a_missing_file_of_tensors_is_named(directory: Path) -> None:
    (directory / "__0_0.distcp").unlink()
    assert "__0_0.distcp" in _refused(directory)


def test_missing_metadata_is_no_checkpoint(directory: Path) -> None:
    (directory / ".metadata").unlink()
    assert "is no checkpoint: there is no .metadata file in it" in _refused(directory)


def test_metadata_that_is_a_folder_is_refused(directory: Path) -> None:
    (directory / ".metadata").unlink()
    (directory / ".metadata").mkdir()
    _refused(directory)
