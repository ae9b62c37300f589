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
        self.data = b""
        self.start = self.at = 0
        """Places in the data: where what has not been given of the value begins, and how far it is read."""
        self._depth = 0
        self._in_string = False

    def __iter__(self) -> Iterator[tuple[bytes, "LongValue | None"]]:
        is_array = self._peek() == b"["
        self.at += is_array
        while (first := self._peek()) not in (b"", b"]"):
            self.start = self.at
            if first not in b'{["':
                yield self._word(), None
                continue
            while not self.scan():
                if self.at - self.start > byte_blocks.LONG_RECORD:
                    rest = LongValue(self)
                    yield rest.first, rest
                    for _ in rest:
                        pass
                    break
                if not self.more():
                    raise _CUT_OFF
            else:
                yield self.data[self.start : self.at], None
        if is_array and first != b"]":
            raise DamagedFile("its array has no end")
        self.at += len(first)
        if self._peek():
            raise DamagedFile("something stands behind its values")

    def more(self) -> bool:
        """Read on, and forget what lies before the value; False at the end of the file."""
        following = next((block for block in self._blocks if block), b"")
        self.data = self.data[self.start :] + following
        self.at -= self.start
        self.start = 0
        return bool(following)

    def _peek(self) -> bytes:
        """Return the next byte behind white space and commas; none at the end."""
        while True:
            found = _BETWEEN.match(self.data, self.at)
            assert found is not None  # it matches nothing too
            self.start = self.at = found.end()
            if self.at < len(self.data) or not self.more():
                return self.data[self.at : self.at + 1]

    def _word(self) -> bytes:
        """Return what is no object, list or string, such as a number."""
        while True:
            found = _WORD.match(self.data, self.start)
            assert found is not None
            # A bracket that closes nothing is a value of its own.
            self.at = max(found.end(), self.start + 1)
            if self.at < len(self.data) or len(found[0]) > byte_blocks.LONG_RECORD or not self.more():
                return self.data[self.start : self.at]

    def scan(self) -> bool:
        """Go on to the end of the value; False where the data ends before."""
        data = self.data
        while True:
            if self._in_string:
                found = _STRING.match(data, self.at)
                assert found is not None
                self.at = found.end()
                if data[self.at : self.at + 1] != b'"':  # the end, or half an escape before it
                    return False
                self.at += 1
                self._in_string = False
            else:
                found = _OUTSIDE.search(data, self.at)
                if found is None:
                    self.at = len(data)
                    return False
                self.at = found.end()
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
        piece = values.data[values.start : values.at]
        values.start = values.at
        return piece

    def _read(self) -> Iterator[bytes]:
        is_whole = False
        while not is_whole:
            if not self._values.more():
                raise _CUT_OFF
            is_whole = self._values.scan()
            piece = self._take()
            self.length += len(piece)
            yield piece
