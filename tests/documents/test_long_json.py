"""A JSON object in pieces against json.loads: the same text of the same field, whatever the pieces."""

import json
import random
from collections.abc import Iterator

import pytest

from dsv3.documents import long_json
from dsv3.documents.long_json import FieldKind, LongObject, NotJson

CHARACTERS = ["a", "\u00e9", "\u6f22", "\U0001f600", "\n", "\\", '"', "\\ud83d", "/", "\t", " ", "{", "]"]


def blocks(content: bytes, size: int) -> Iterator[bytes]:
    for start in range(0, len(content), size):
        yield content[start : start + size]


def random_object(draw: random.Random) -> dict[str, object]:
    """An object with the field `text` somewhere among values of every kind."""
    text = "".join(draw.choices(CHARACTERS, k=draw.randrange(50)))
    pairs: list[tuple[str, object]] = [
        ("id", [1, {"a": 'x]}"', "text": "no"}]),
        ("number", -1.5e3),
        ("".join(draw.choices(CHARACTERS, k=3)), None),
        ("text", text),
        ("nested", {"text": "no", "list": [[], [True]]}),
        ("empty", ""),
    ]
    draw.shuffle(pairs)
    return dict(pairs)


@pytest.mark.parametrize("seed", range(20))
def test_text_is_that_of_json_loads(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    draw = random.Random(seed)
    found = random_object(draw)
    for ascii_only in (True, False):
        content = f" {json.dumps(found, ensure_ascii=ascii_only, indent=draw.choice([None, 1]))}\n".encode()
        for size in (1, 2, 3, 7, 1000):
            monkeypatch.setattr(long_json, "PIECE", draw.choice([1, 2, 16, 30, 1 << 16]))
            read = LongObject(blocks(content, size), "text")
            pieces = list(read)
            assert "".join(pieces) == found["text"]
            for piece in pieces:
                piece.encode()  # no character is torn
            assert read.kind is FieldKind.text
            assert read.keys == list(found)


@pytest.mark.parametrize("seed", range(10))
def test_an_object_that_is_cut_off_is_refused(seed: int) -> None:
    draw = random.Random(seed)
    content = json.dumps(random_object(draw), ensure_ascii=False).encode()
    for end in draw.sample(range(len(content) - 1), 20):
        with pytest.raises((NotJson, UnicodeDecodeError)):
            "".join(LongObject(blocks(content[:end], 5), "text"))


@pytest.mark.parametrize(
    "content",
    [
        b"[1]",
        b'{"text":"a" "b":1}',
        b'{"text":"a"} x',
        b'{"text":"\\x"}',
        b'{"text":"a\nb"}',
        b'{"text":}',
        b"{text:1}",
        b'{"text":"a",}',
        b'{"text":nul}',
        b'{"text":"a","text":"b"}',
        b"",
    ],
)
def test_what_is_no_object_is_refused(content: bytes) -> None:
    with pytest.raises(NotJson):
        list(LongObject(blocks(content, 3), "text"))


@pytest.mark.parametrize(
    ("content", "kind"), [('{"a": 1}', "missing"), ('{"text": [1]}', "other"), ("{}", "missing")]
)
def test_a_field_without_text_is_told(content: str, kind: str) -> None:
    read = LongObject(blocks(content.encode(), 2), "text")
    assert list(read) == []
    assert read.kind.value == kind
