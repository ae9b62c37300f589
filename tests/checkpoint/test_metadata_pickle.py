"""Pickles that run no code and do harm all the same: each is refused in memory of its size."""

import pickle
import resource
import struct
import tracemalloc
from typing import Any

import pytest

from dsv3.checkpoint.metadata_pickle import Record, load_records
from tests.checkpoint.hostile import text, whole


class _Known(Record):
    __slots__ = ()


def _find_class(module: str, name: str) -> Any:
    return {"Record": _Known, "tuple": tuple, "dict": dict, "dtype": 1.5}[name]


KNOWN = text("m") + text("Record") + pickle.STACK_GLOBAL
SIZE = text("m") + text("tuple") + pickle.STACK_GLOBAL

# Twice itself, sixty times over: 2^60 tuples to hash, copy or print.
BOMB = b"".join(
    [pickle.EMPTY_TUPLE, *(pickle.MEMOIZE + pickle.BINGET + bytes([n]) + pickle.TUPLE2 for n in range(60))]
)
DEEP = pickle.EMPTY_TUPLE + pickle.TUPLE1 * 100_000

HARMFUL = {
    "a place of the memo near 2^28": (
        text("a") + pickle.LONG_BINPUT + struct.pack("<I", 361496727),
        "remembers an object at place 361,496,727 after 0 others",
    ),
    "a key whose hash has no end": (
        pickle.EMPTY_DICT + BOMB + pickle.NONE + pickle.SETITEM,
        "tuple as a key",
    ),
    "a key too deep to hash": (pickle.EMPTY_DICT + DEEP + pickle.NONE + pickle.SETITEM, "tuple as a key"),
    "keys together": (
        pickle.EMPTY_DICT + pickle.MARK + BOMB + pickle.NONE + pickle.SETITEMS,
        "tuple as a key",
    ),
    "a set": (b"\x8f" + pickle.MARK + BOMB + b"\x90", "instruction 0x8f"),
    "a frozen set": (pickle.MARK + BOMB + b"\x91", "instruction 0x91"),
    "what stands twice": (pickle.EMPTY_TUPLE + pickle.DUP, "instruction 0x32"),
    "a text of 4 GB": (b"X\xff\xff\xff\xff", "text of 4,294,967,295 bytes"),
    "a text of 2^60 bytes": (b"\x8d" + struct.pack("<Q", 2**60), "instruction 0x8d"),
    "bytes": (b"B\xff\xff\xff\xff", "instruction 0x42"),
    "a byte array": (b"\x96" + struct.pack("<Q", 2**60), "instruction 0x96"),
    "a number of 255 bytes": (b"\x8a\xff" + b"\xff" * 255, "number of 255 bytes"),
    "a number of 2 GB": (b"\x8b\xff\xff\xff\x7f", "instruction 0x8b"),
    "a number of digits": (b"I" + b"9" * 5000 + b"\n", "instruction 0x49"),
    "pairs for a dict": (
        text("m") + text("dict") + pickle.STACK_GLOBAL + BOMB + pickle.TUPLE1 + pickle.REDUCE,
        "calls 'dict'",
    ),
    "nothing on the stack": (pickle.REDUCE, "empty stack"),
    "no mark": (pickle.TUPLE, "empty stack"),
    "fewer than three": (pickle.NONE + pickle.TUPLE3, "empty stack"),
    "items without a dict": (pickle.NONE + text("a") + pickle.NONE + pickle.SETITEM, "no dict"),
    "a key alone": (pickle.EMPTY_DICT + pickle.MARK + text("a") + pickle.SETITEMS, "shorter|longer"),
    "items in a text": (text("a") + pickle.NONE + pickle.APPEND, "no list"),
    "an object with arguments": (KNOWN + pickle.NONE + pickle.TUPLE1 + pickle.NEWOBJ, "with arguments"),
    "an object of a tuple": (SIZE + pickle.EMPTY_TUPLE + pickle.NEWOBJ, "makes an object of 'tuple'"),
    "a call of a number": (
        text("m") + text("dtype") + pickle.STACK_GLOBAL + pickle.EMPTY_TUPLE + pickle.REDUCE,
        "calls a float",
    ),
    "a call with a text": (SIZE + text("a") + pickle.REDUCE, "calls 'tuple'"),
    "attributes of a class": (KNOWN + pickle.EMPTY_DICT + pickle.BUILD, "sets attributes of '_Known'"),
    "a name of no text": (pickle.NONE + text("a") + pickle.STACK_GLOBAL, "what is no text"),
    "no end of a name": (pickle.GLOBAL + b"a" * 100_000, "not found"),
}


@pytest.mark.parametrize("case", HARMFUL)
def test_it_is_refused_in_memory_of_its_size(case: str) -> None:
    instructions, words = HARMFUL[case]
    raw = whole(instructions)
    tracemalloc.start()
    with pytest.raises(ValueError, match=words) as caught:
        load_records(raw, _find_class)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(str(caught.value)) < 200
    assert peak < 100 * len(raw) + 2**17


@pytest.mark.parametrize("value", ["BOMB", "DEEP"])
def test_tuples_without_end_are_only_held(value: str) -> None:
    """They are what a field may hold: each field's reader refuses what is not of its kind."""
    found = load_records(whole({"BOMB": BOMB, "DEEP": DEEP}[value]), _find_class)
    assert isinstance(found, tuple)


def test_every_cut_is_refused() -> None:
    raw = pickle.dumps({"a": [1, 300, 70_000, -5, 2**40, None, True], "b": ("x", ("y", "z", 1), ())})
    assert load_records(raw, _find_class) == pickle.loads(raw)
    for length in range(len(raw)):
        with pytest.raises(ValueError):
            load_records(raw[:length], _find_class)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_values_of_every_kind_are_those_of_pickle(protocol: int) -> None:
    deep: Any = 0
    for _ in range(200):
        deep = [deep]
    value: dict[Any, Any] = {
        "a": [1, 255, 256, 65_536, -1, 2**31, 2**62],
        5: (),
        "b": ((1,), (1, 2), (1, 2, 3), (1, 2, 3, 4)),
    }
    value |= {"c": ["ä" * 300, None, True, False], "d": {"e": {}, "f": []}, "g": deep, "h": "\ud800"}
    assert load_records(pickle.dumps(value, protocol), _find_class) == value


def test_the_case_from_outside_is_refused_in_little_memory() -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    raw = pickle.dumps({"a": 1})
    put = pickle.LONG_BINPUT + struct.pack("<I", 2**28)
    with pytest.raises(ValueError, match="place 268,435,456"):
        load_records(raw[:-1] + put + raw[-1:], _find_class)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**16  # KiB
