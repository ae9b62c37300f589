"""The text of one field of a JSON object that is too long to be held: read in pieces, as json.loads would.

A line of a gigabyte is mostly one string. The scanner keeps no more of the object than a key and the state of
the text around it: whether it stands in a string, and how deep objects and lists are nested.
"""

import json
import re
from collections.abc import Iterator
from enum import Enum

LARGEST_KEY = 1 << 16
"""Bytes of a key or of a value that is no string, beyond which the object is not read."""

PIECE = 1 << 16
"""Bytes of the field's text that are given at once, about."""

_LONGEST_ESCAPE = 6

_CONTENT = re.compile(rb'(?:[^"\\\x00-\x1f]++|\\(?:["\\/bfnrt]|u[0-9a-fA-F]{4}))*+')
"""Characters and whole escapes of a string."""

_HALF = re.compile(rb"\\u[dD][89abAB][0-9a-fA-F]{2}")
"""The first half of a character beyond 16 bits, which is the last escape of a piece."""

_STRUCTURE = re.compile(rb'["{}\[\]]')
_SPACE = b" \t\r\n"


class NotJson(Exception):
    """The bytes are no JSON object."""


class FieldKind(Enum):
    """The value that a field has."""

    missing = "missing"
    text = "text"
    other = "other"


class LongObject:
    """One JSON object of many bytes: iterate over the pieces of the text at `field`.

    After the iteration `kind` says what the field holds, and `keys` names the first fields of the object.

    Args:
        blocks: the bytes of the object, white space around it included.

    Raises:
        NotJson: while iterating, perhaps after pieces have been given.
        UnicodeDecodeError: the text is not UTF-8.
    """

    def __init__(self, blocks: Iterator[bytes], field: str) -> None:
        self.kind = FieldKind.missing
        self.keys: list[str] = []
        self._field = field
        self._blocks = blocks
        self._data = b""
        self._place = 0

    def __iter__(self) -> Iterator[str]:
        self._expect(b"{")
        if self._peek() == b"}":
            self._take()
        else:
            while True:
                key = self._key()
                if len(self.keys) < 8:
                    self.keys.append(key)
                self._expect(b":")
                if key == self._field:
                    if self.kind is not FieldKind.missing:
                        raise NotJson(f"the field {key!r} stands there twice")
                    if self._peek() == b'"':
                        self.kind = FieldKind.text
                        self._take()
                        yield from self._decode(self._string())
                    else:
                        self.kind = FieldKind.other
                        self._skip_value()
                else:
                    self._skip_value()
                following = self._peek()
                self._take()
                if following == b"}":
                    break
                if following != b",":
                    raise NotJson("a comma or a brace is missing")
        if self._peek():
            raise NotJson("something stands behind the object")

    def _more(self) -> bool:
        """Take the next bytes in place of those that have been read; False at the end."""
        following = next((block for block in self._blocks if block), b"")
        self._data = self._data[self._place :] + following
        self._place = 0
        return bool(following)

    def _peek(self) -> bytes:
        """Return the next byte that is no white space; none at the end."""
        while True:
            while self._place < len(self._data):
                if self._data[self._place] not in _SPACE:
                    return self._data[self._place : self._place + 1]
                self._place += 1
            if not self._more():
                return b""

    def _take(self) -> None:
        self._place += 1

    def _expect(self, byte: bytes) -> None:
        if self._peek() != byte:
            raise NotJson(f"{byte.decode()} is missing")
        self._take()

    def _key(self) -> str:
        self._expect(b'"')
        parts: list[bytes] = []
        for part in self._string():
            parts.append(part)
            if sum(map(len, parts)) > LARGEST_KEY:
                raise NotJson("a key is too long")
        return _unescape(b"".join(parts))

    def _string(self) -> Iterator[bytes]:
        """Yield the bytes up to the closing quote; a piece ends behind a whole escape."""
        while True:
            found = _CONTENT.match(self._data, self._place)
            assert found is not None  # it matches nothing too
            self._place = found.end()
            if found[0]:
                yield found[0]
            ahead = self._ahead(_LONGEST_ESCAPE)
            if not ahead:
                raise NotJson("it ends within a string")
            if ahead.startswith(b'"'):
                self._take()
                return
            if not _CONTENT.match(ahead)[0]:  # type: ignore[index]
                raise NotJson("an escape or a control character in a string is none of JSON's")

    def _ahead(self, count: int) -> bytes:
        """Return the next `count` bytes, fewer at the end, without taking them."""
        while len(self._data) - self._place < count and self._more():
            pass
        return self._data[self._place : self._place + count]

    def _decode(self, pieces: Iterator[bytes]) -> Iterator[str]:
        """Yield a string's pieces as text, cut where a character is whole."""
        waiting = b""
        for piece in pieces:
            waiting += piece
            if len(waiting) > PIECE:
                cut = _whole_characters(waiting)
                yield _unescape(waiting[:cut])
                waiting = waiting[cut:]
        if waiting:
            yield _unescape(waiting)

    def _skip_value(self) -> None:
        first = self._peek()
        if first == b'"':
            self._take()
            for _ in self._string():
                pass
        elif first in (b"{", b"["):
            self._skip_nested()
        else:
            self._skip_word()

    def _skip_nested(self) -> None:
        """Skip an object or a list by its brackets; what stands between them is not checked."""
        depth = 0
        while True:
            found = _STRUCTURE.search(self._data, self._place)
            if found is None:
                self._place = len(self._data)
                if not self._more():
                    raise NotJson("it ends within an object or a list")
                continue
            self._place = found.end()
            if found[0] == b'"':
                for _ in self._string():
                    pass
            else:
                depth += 1 if found[0] in b"{[" else -1
                if depth == 0:
                    return

    def _skip_word(self) -> None:
        """Skip a number, true, false or null."""
        word = b""
        while (byte := self._ahead(1)) and byte not in b",}] \t\r\n":
            word += byte
            self._take()
            if len(word) > LARGEST_KEY:
                raise NotJson("a number is too long")
        try:
            json.loads(word)
        except ValueError:
            raise NotJson("a value is missing") from None


def _unescape(content: bytes) -> str:
    """Return the text of what stands between two quotes."""
    return str(json.loads(f'"{content.decode()}"'))


def _whole_characters(content: bytes) -> int:
    """Return where to cut content whose last character may go on behind it: in UTF-8, or as an escape."""
    before, last = content[:-_LONGEST_ESCAPE], content[-_LONGEST_ESCAPE:]
    if _HALF.fullmatch(last) and (len(before) - len(before.rstrip(b"\\"))) % 2 == 0:
        return len(before)
    end = len(content)
    while end > 0 and end > len(content) - 4 and content[end - 1] & 0xC0 == 0x80:
        end -= 1  # the bytes that continue a character
    return end - 1 if end > 0 and content[end - 1] >= 0xC0 else len(content)
