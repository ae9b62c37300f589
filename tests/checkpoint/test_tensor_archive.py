"""Archives of torch.save that torch.load would never finish, or unpack without end, are refused before it."""

import contextlib
import io
import pickle
import struct
import zipfile
from collections.abc import Callable, Iterable

import pytest
import torch

from dsv3.checkpoint.tensor_archive import require_tensor_archive
from tests.checkpoint.hostile import text, whole

TENSORS = {
    "plain": torch.arange(6.0).reshape(2, 3),
    "bf16": torch.ones(3, 4, dtype=torch.bfloat16),
    "fp8": torch.ones(2, dtype=torch.float8_e4m3fn),
    "a number": torch.tensor(7),
    "empty": torch.empty(0, 4),
    "transposed": torch.arange(6.0).reshape(2, 3).t(),
    "a parameter": torch.nn.Parameter(torch.ones(2)),
    "large": torch.zeros(2**18),
}


def _saved(tensor: torch.Tensor) -> bytes:
    file = io.BytesIO()
    torch.save(tensor, file)
    return file.getvalue()


@pytest.mark.parametrize("name", TENSORS)
def test_what_torch_saves_is_read(name: str) -> None:
    file = io.BytesIO(_saved(TENSORS[name]))
    require_tensor_archive(file)
    assert torch.equal(torch.load(file, weights_only=True), TENSORS[name])


def _repacked(content: bytes, compression: int = zipfile.ZIP_STORED, more: Iterable[str] = ()) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        archive.writestr("archive/data.pkl", content)
        for name in more:
            archive.writestr(f"archive/{name}", b"")
    return file.getvalue()


BOMB = pickle.EMPTY_DICT + pickle.EMPTY_TUPLE
for _number in range(60):
    BOMB += pickle.BINPUT + bytes([_number]) + pickle.BINGET + bytes([_number]) + pickle.TUPLE2
BOMB += pickle.NONE + pickle.SETITEM

HARMFUL: dict[str, tuple[Callable[[], bytes], str]] = {
    "a key whose hash has no end": (lambda: _repacked(whole(BOMB, 2)), "tuple as a key"),
    "a long pickle": (lambda: _repacked(whole(text("x") * 10_000, 2)), "larger than a tensor's"),
    "a compressed pickle": (lambda: _repacked(b"\0" * 2**24, zipfile.ZIP_DEFLATED), "compressed"),
    "many files": (
        lambda: _repacked(whole(pickle.NONE, 2), more=[f"data/{n}" for n in range(100)]),
        "directory is larger",
    ),
    "no pickle": (
        lambda: _saved(torch.ones(2)).replace(b"data.pkl", b"data.pkx"),
        "no archive of one object",
    ),
    "an old form": (lambda: pickle.dumps(0), "no archive of torch.save"),
    "a comment behind it": (lambda: _saved(torch.ones(2)) + b"more", "cut off, or has a comment"),
    "half": (lambda: _saved(torch.ones(2))[:200], "cut off"),
    "no bytes": (lambda: b"", "no archive"),
    "a header alone": (lambda: b"PK\x03\x04", "cut off"),
    "a directory elsewhere": (lambda: _moved(2**31), "directory is"),
}


def _moved(place: int) -> bytes:
    """Return an archive of Python's whose end says that the directory begins at `place`."""
    raw = bytearray(_repacked(whole(pickle.NONE, 2)))
    raw[-6:-2] = struct.pack("<I", place)
    return bytes(raw)


@pytest.mark.parametrize("case", HARMFUL)
def test_it_is_refused(case: str) -> None:
    make, words = HARMFUL[case]
    with pytest.raises(ValueError, match=words) as caught:
        require_tensor_archive(io.BytesIO(make()))
    assert len(str(caught.value)) < 200


def test_no_change_of_a_byte_is_an_error_of_another_kind() -> None:
    raw = _saved(torch.ones(2))
    for place in range(0, len(raw), 3):
        changed = bytearray(raw)
        changed[place] ^= 0xFF
        with contextlib.suppress(ValueError):
            require_tensor_archive(io.BytesIO(bytes(changed)))
