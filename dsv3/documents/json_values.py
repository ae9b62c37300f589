"""The values of a JSON file that has no line for each: an array's elements, or objects one after the other.

A value ends where its brackets do, so that nothing is parsed to find it, and no more than LONG_RECORD bytes
of one are held.
"""

import re
from collections.abc import Iterator

from dsv3.documents import byte_blocks
from dsv3.documents.byte_blocks import DamagedFile

_OUTSIDE = re.compile(rb'["{}\[\]]')
_STRING = re.compile(rb'(?:[^"\\]++|\\.)*+', re.DOTALL)
_BETWEEN = re.compile(rb"[\s,]*+")
_WORD = re.compile(rb"[^\s,\]}]*+")

_CUT_OFF = DamagedFile("its last value has no end")


class JsonValues:
    """Iterate over the values in blocks of a file: (bytes, None), or (first bytes, LongValue) of a long one.

    A LongValue is to be read before the next value is asked for; what is not read then is read over. What
    stands between brackets is not checked.

    Raises:
        DamagedFile: the file ends within a value or within the array.
    """

    def __init__(self, blocks: Iterator[bytes]) -> None:
        self._blocks = blocks
        self._data = b""
        self._start = self._at = 0
        """Places in the data: where what has not been given of the value begins, and how far it is read."""
        self._depth = 0
        self._in_string = False

    def __iter__(self) -> Iterator[tuple[bytes, "LongValue | None"]]:
        is_array = self._peek() == b"["
        self._at += is_array
        while (first := self._peek()) not in (b"", b"]"):
            self._start = self._at
            if first not in b'{["':
                yield self._word(), None
                continue
            while not self._scan():
                if self._at - self._start > byte_blocks.LONG_RECORD:
                    rest = LongValue(self)
                    yield rest.first, rest
                    for _ in rest:
                        pass
                    break
                if not self._more():
                    raise _CUT_OFF
            else:
                yield self._data[self._start : self._at], None
        if is_array and first != b"]":
            raise DamagedFile("its array has no end")
        self._at += len(first)
        if self._peek():
            raise DamagedFile("something stands behind its values")

    def _more(self) -> bool:
        """Read on, and forget what lies before the value; False at the end of the file."""
        following = next((block for block in self._blocks if block), b"")
        self._data = self._data[self._start :] + following
        self._at -= self._start
        self._start = 0
        return bool(following)

    def _peek(self) -> bytes:
        """Return the next byte behind white space and commas; none at the end."""
        while True:
            found = _BETWEEN.match(self._data, self._at)
            assert found is not None  # it matches nothing too
            self._start = self._at = found.end()
            if self._at < len(self._data) or not self._more():
                return self._data[self._at : self._at + 1]

    def _word(self) -> bytes:
        """Return what is no object, list or string, such as a number."""
        while True:
            found = _WORD.match(self._data, self._start)
            assert found is not None
            # A bracket that closes nothing is a value of its own.
            self._at = max(found.end(), self._start + 1)
            if self._at < len(self._data) or len(found[0]) > byte_blocks.LONG_RECORD or not self._more():
                return self._data[self._start : self._at]

    def _scan(self) -> bool:
        """Go on to the end of the value; False where the data ends before."""
        data = self._data
        while True:
            if self._in_string:
                found = _STRING.match(data, self._at)
                assert found is not None
                self._at = found.end()
                if data[self._at : self._at + 1] != b'"':  # the end, or half an escape before it
                    return False
                self._at += 1
                self._in_string = False
            else:
                found = _OUTSIDE.search(data, self._at)
                if found is None:
                    self._at = len(data)
                    return False
                self._at = found.end()
                if found[0] == b'"':
                    self._in_string = True
                    continue
                self._depth += 1 if found[0] in b"{[" else -1
            if self._depth <= 0:
                self._depth = 0
                return True


class LongValue:
    """The rest of a value that is too long to be held: iterate once over its bytes."""

    def __init__(self, values: JsonValues) -> None:
        self._values = values
        self.first = self._take()
        self.length = 0
        """Bytes given since the first ones."""
        self._pieces = self._read()

    def __iter__(self) -> Iterator[bytes]:
        return self._pieces

    def _take(self) -> bytes:
        values = self._values
        piece = values._data[values._start : values._at]
        values._start = values._at
        return piece

    def _read(self) -> Iterator[bytes]:
        is_whole = False
        while not is_whole:
            if not self._values._more():
                raise _CUT_OFF
            is_whole = self._values._scan()
            piece = self._take()
            self.length += len(piece)
            yield piece
