"""Load the pickle of a `.metadata` or a tensor with an interpreter of our own: no code, and bounded memory.

Python's unpickler is no reader for strangers' files even where no class can be named. A `put` of 5 bytes lets
it allocate a table of 2^29 places. A key of tuples that hold one another twice never ends its hash, and one
nested a million deep ends the process. The interpreter here knows only the instructions that DCP's metadata
consists of (https://docs.python.org/3/library/pickletools.html). An instruction makes at most one object, so
the file's size bounds the memory. It takes 9 us per shard of a tensor, where Python's in C takes 2.
"""

from collections.abc import Callable
from struct import Struct
from struct import error as StructError
from typing import Any

from dsv3.errors import quoted


class Record:
    """Stands in for an object of a pickle and keeps its state, or else the arguments it was made with.

    It is compared and hashed as itself, whatever it holds.
    """

    __slots__ = ("state",)
    """A checkpoint of 2,048 ranks has 2 million records, and each rank reads them."""

    def __init__(self, *arguments: Any) -> None:
        self.state: Any = arguments


_U16, _U32, _I32, _U64 = (Struct(form).unpack_from for form in ("<H", "<I", "<i", "<Q"))

_NEW_RECORD = b")\x81\x94}\x94("
"""EMPTY_TUPLE NEWOBJ MEMOIZE EMPTY_DICT MEMOIZE MARK: an object begins, as protocol 4 and later write it."""

_CALLED = b"\x85\x94R\x94"
"""TUPLE1 MEMOIZE REDUCE MEMOIZE: the object on the stack is made into another one."""

_LONGEST_TEXT = 2**16
"""Bytes of a name or a path."""

_LONGEST_NUMBER = 16
"""Bytes of a whole number, of which a tensor's sizes need 8."""


def load_records(raw: bytes, find_class: Callable[[str, str], Any]) -> Any:
    """Return what a pickle describes: dicts, lists, tuples, texts, numbers and Records.

    The pickle is of protocol 2 or later. `find_class` returns the stand-in for a module's name: a subclass of
    Record, `tuple`, `dict`, or a value that is taken as it is; it raises for a name that is refused.

    Raises:
        ValueError: the pickle is cut off or holds what DCP does not write.
    """
    try:
        return _load(raw, find_class)
    except (IndexError, StructError):
        raise ValueError("it ends, or takes from an empty stack, within an instruction") from None


def _load(raw: bytes, find_class: Callable[[str, str], Any]) -> Any:
    stack: list[Any] = []
    marks: list[int] = []
    """Heights of the stack at the marks that are open."""
    memo: list[Any] = []
    push, remember, place = stack.append, memo.append, 0
    while True:
        code = raw[place]
        place += 1
        # The most frequent first: a file of a large model has a hundred million.
        if code == 0x94:  # MEMOIZE
            remember(stack[-1])
        elif code == 0x6A:  # LONG_BINGET
            push(memo[_U32(raw, place)[0]])
            place += 4
        elif code == 0x68:  # BINGET
            push(memo[raw[place]])
            place += 1
        elif code == 0x4B:  # BININT1
            push(raw[place])
            place += 1
        elif code == 0x4D:  # BININT2
            push(_U16(raw, place)[0])
            place += 2
        elif code == 0x29:  # EMPTY_TUPLE
            if raw.startswith(_NEW_RECORD, place - 1):
                place += len(_NEW_RECORD) - 1
                stack[-1] = record = _new(stack[-1])
                state: dict[Any, Any] = {}
                remember(record)
                remember(state)
                push(state)
                marks.append(len(stack))
            else:
                push(())
        elif code == 0x85:  # TUPLE1
            if raw.startswith(_CALLED, place - 1):
                place += len(_CALLED) - 1
                arguments = (stack.pop(),)
                remember(arguments)
                stack[-1] = _called(stack[-1], arguments)
                remember(stack[-1])
            else:
                stack[-1] = (stack[-1],)
        elif code == 0x86:  # TUPLE2
            last = stack.pop()
            stack[-1] = (stack[-1], last)
        elif code == 0x75:  # SETITEMS
            _set_items(stack, marks.pop())
        elif code == 0x62:  # BUILD
            state = stack.pop()
            if not isinstance(stack[-1], Record):
                raise ValueError(f"it sets attributes of {_kind(stack[-1])}")
            stack[-1].state = state
        elif code == 0x28:  # MARK
            marks.append(len(stack))
        elif code == 0x4A:  # BININT
            push(_I32(raw, place)[0])
            place += 4
        elif code == 0x8C:  # SHORT_BINUNICODE
            place = _push_text(stack, raw, place + 1, raw[place])
        elif code == 0x58:  # BINUNICODE
            place = _push_text(stack, raw, place + 4, _U32(raw, place)[0])
        elif code == 0x71:  # BINPUT
            _put(memo, raw[place], stack[-1])
            place += 1
        elif code == 0x72:  # LONG_BINPUT
            _put(memo, _U32(raw, place)[0], stack[-1])
            place += 4
        elif code == 0x81:  # NEWOBJ
            if stack.pop() != ():
                raise ValueError("it makes an object with arguments")
            stack[-1] = _new(stack[-1])
        elif code == 0x7D:  # EMPTY_DICT
            push({})
        elif code == 0x5D:  # EMPTY_LIST
            push([])
        elif code == 0x52:  # REDUCE
            arguments = stack.pop()
            stack[-1] = _called(stack[-1], arguments)
        elif code == 0x87:  # TUPLE3
            _make_tuple(stack, len(stack) - 3)
        elif code == 0x74:  # TUPLE
            _make_tuple(stack, marks.pop())
        elif code == 0x73:  # SETITEM
            _set_items(stack, len(stack) - 2)
        elif code == 0x65:  # APPENDS
            _append(stack, marks.pop())
        elif code == 0x61:  # APPEND
            _append(stack, len(stack) - 1)
        elif code == 0x8A:  # LONG1
            length = raw[place]
            if length > _LONGEST_NUMBER:
                raise ValueError(f"it holds a number of {length} bytes")
            push(int.from_bytes(raw[place + 1 : place + 1 + length], "little", signed=True))
            place += 1 + length
        elif code == 0x4E:  # NONE
            push(None)
        elif code in (0x88, 0x89):  # NEWTRUE, NEWFALSE
            push(code == 0x88)
        elif code == 0x93:  # STACK_GLOBAL
            name = stack.pop()
            stack[-1] = _found(find_class, stack[-1], name)
        elif code in (0x63, 0x69):  # GLOBAL, INST
            ends = raw.index(b"\n", place, place + _LONGEST_TEXT), 0
            ends = ends[0], raw.index(b"\n", ends[0] + 1, ends[0] + _LONGEST_TEXT)
            push(_found(find_class, raw[place : ends[0]].decode(), raw[ends[0] + 1 : ends[1]].decode()))
            place = ends[1] + 1
            if code == 0x69:
                raise ValueError("it makes an object as protocol 0 does")
        elif code == 0x51:  # BINPERSID: a storage, in the pickle of a tensor
            stack[-1] = Record(stack[-1])
        elif code == 0x30:  # POP
            stack.pop()
        elif code == 0x95:  # FRAME: only says how many bytes belong together
            place += 8
        elif code == 0x80:  # PROTO
            place += 1
        elif code == 0x2E:  # STOP
            return stack.pop()
        else:
            raise ValueError(f"it holds the instruction {code:#04x}, which no checkpoint needs")


def _push_text(stack: list[Any], raw: bytes, begin: int, length: int) -> int:
    """Push the text that begins at `begin`; returns where it ends."""
    end = begin + length
    if length > _LONGEST_TEXT or end > len(raw):
        raise ValueError(f"it holds a text of {length:,} bytes")
    stack.append(raw[begin:end].decode("utf-8", "surrogatepass"))
    return end


def _put(memo: list[Any], place: int, value: Any) -> None:
    """Remember `value` at a place of the memo, which Python fills in order."""
    if place == len(memo):
        memo.append(value)
    elif place < len(memo):
        memo[place] = value
    else:
        raise ValueError(f"it remembers an object at place {place:,} after {len(memo):,} others")


def _new(kind: Any) -> Record:
    """Return an empty object of a stand-in."""
    if not (isinstance(kind, type) and issubclass(kind, Record)):
        raise ValueError(f"it makes an object of {_kind(kind)}")
    return kind.__new__(kind)


def _called(kind: Any, arguments: Any) -> Any:
    """Return what a stand-in makes of `arguments`."""
    if isinstance(arguments, tuple):
        if kind is tuple and len(arguments) == 1 and isinstance(arguments[0], tuple | list):
            return tuple(arguments[0])
        if kind is dict and not arguments:
            return {}
        if isinstance(kind, type) and issubclass(kind, Record):
            return kind(*arguments)
    raise ValueError(f"it calls {_kind(kind)} with what no checkpoint does")


def _set_items(stack: list[Any], begin: int) -> None:
    """Put the pairs from `begin` on into the dict below them."""
    target, items = stack[begin - 1], iter(stack[begin:])
    if begin < 1 or type(target) is not dict:
        raise ValueError("it sets items of what is no dict")
    for key, value in zip(items, items, strict=True):
        # A tuple's hash is as much work as all that the tuples in it stand for.
        if type(key) is not str and not isinstance(key, Record | int):
            raise ValueError(f"it has {_kind(key)} as a key")
        target[key] = value
    del stack[begin:]


def _append(stack: list[Any], begin: int) -> None:
    """Put the objects from `begin` on into the list below them."""
    if begin < 1 or type(stack[begin - 1]) is not list:
        raise ValueError("it appends to what is no list")
    stack[begin - 1].extend(stack[begin:])
    del stack[begin:]


def _make_tuple(stack: list[Any], begin: int) -> None:
    """Make the objects from `begin` on one tuple."""
    if begin < 0:
        raise IndexError
    stack[begin:] = [tuple(stack[begin:])]


def _found(find_class: Callable[[str, str], Any], module: Any, name: Any) -> Any:
    if not (isinstance(module, str) and isinstance(name, str)):
        raise ValueError("it names a class by what is no text")
    return find_class(module, name)


def _kind(value: Any) -> str:
    """Return an object's kind for a message, not its content, which may have no end."""
    return quoted(value.__name__) if isinstance(value, type) else f"a {type(value).__name__}"
