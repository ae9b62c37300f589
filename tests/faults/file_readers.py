"""The readers of single files that are fuzzed (benchmarks/fuzz_readers.py), for corruptions.py."""

from functools import cache, partial
from pathlib import Path

from benchmarks.fuzz_readers import CASES
from benchmarks.fuzz_readers import READERS as FILES
from tests.faults.corruptions import Reader

__all__ = ["CASES", "FILES", "READERS"]


@cache
def _sound(name: str) -> bytes:
    return FILES[name].seeds()[0]


def _write(name: str, folder: Path) -> Path:
    (folder / FILES[name].name).write_bytes(_sound(name))
    return folder


READERS = {name: Reader(name, partial(_write, name), reader.read) for name, reader in FILES.items()}
