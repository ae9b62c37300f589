"""The record of a run's data: names, sizes and digests, such that a later change can be named.

A fingerprint says that data is other data. The record says what of it: which files were changed, added,
removed or renamed, and whether the rows keep their places. It has at most LIMIT entries whatever the data: of
more pieces, neighbours share one. Their borders depend on the names alone, so that one file more or less
changes one entry.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import xxhash

from dsv3.untrusted_files import read_json

LIMIT = 4096
"""Entries of a record: less than 1 MB of JSON, and in memory."""

NAMED = 3
"""Names that a change tells of each kind."""

FORMAT, VERSION = "dsv3-data-record", 1

_WORD = 2**128 - 1


class Piece(NamedTuple):
    """A part of the data that is told by name: a file, a shard, or some rows of a table."""

    name: str
    """Relative to the root of the data, so that moved data has the names it had."""
    size: int
    """Bytes or characters."""
    digest: str
    """Of the content; equal for equal contents."""
    documents: int | None = None
    tokens: int | None = None


class Entry(NamedTuple):
    """One piece, or neighbouring ones together."""

    first: str
    last: str
    pieces: int
    size: int
    digest: str
    """That of the one piece; of several the sum of hashes of name, size and digest, 32 hex digits."""


@dataclass(frozen=True)
class DataRecord:
    """The parts that data consists of.

    Attributes:
        noun: what a piece is, in the plural: `files`, `shards`.
        layout: equal where equally many documents of equal numbers of tokens come in equal order, so that
            the rows are cut alike; None: unknown.
        level: an entry begins with each name whose hash ends in so many zero bits; 0: one entry per piece.
        entries: in the order of the data.
    """

    noun: str
    layout: str | None
    level: int
    entries: list[Entry]

    @classmethod
    def of(cls, pieces: Iterable[Piece], layout: str | None, noun: str = "files") -> "DataRecord":
        """Return the record of pieces in the order of the data; no more than LIMIT entries are held."""
        level, entries = 0, list[Entry]()
        for piece in pieces:
            entry = Entry(piece.name, piece.name, 1, piece.size, piece.digest)
            if entries and not _begins(piece.name, level):
                entries[-1] = _join(entries[-1], entry)
            else:
                entries.append(entry)
            while len(entries) > LIMIT:
                level += 1
                entries = _at_level(entries, level)
        return cls(noun, layout, level, entries)

    @classmethod
    def joined(cls, records: "Mapping[str, DataRecord | None]") -> "DataRecord":
        """Return the record of several data by name; the pieces of each carry its name before theirs."""
        layouts = [f"{name} {record and record.layout}" for name, record in records.items()]
        known = {name: record for name, record in records.items() if record is not None}
        level = max((record.level for record in known.values()), default=0)
        entries = [
            entry._replace(first=f"{name}: {entry.first}", last=f"{name}: {entry.last}")
            for name, record in known.items()
            for entry in _at_level(record.entries, level)
        ]
        whole = len(known) == len(records) and all(record.layout for record in known.values())
        nouns = {record.noun for record in known.values()}
        noun = nouns.pop() if len(nouns) == 1 else "parts"
        return cls(noun, layout_digest(layouts) if whole else None, level, entries)

    def write(self, file: Path) -> None:
        """Write the record as JSON, complete or not at all."""
        content = {"format": FORMAT, "version": VERSION, "noun": self.noun, "layout": self.layout}
        content |= {"level": self.level, "entries": self.entries}
        partial = file.with_name(f".partial-{file.name}")
        partial.write_text(json.dumps(content, separators=(",", ":")), "utf-8")  # names may be no UTF-8
        partial.replace(file)

    @classmethod
    def read(cls, file: Path) -> "DataRecord | None":
        """Return the record in a file, None where there is none that can be read: it is told, not needed."""
        try:
            content: Any = read_json(file)
            if (content["format"], content["version"]) != (FORMAT, VERSION):
                return None
            entries = [
                Entry(str(first), str(last), int(count), int(size), str(digest))
                for first, last, count, size, digest in content["entries"]
            ]
            layout = content["layout"]
            return cls(str(content["noun"]), layout and str(layout), min(int(content["level"]), 64), entries)
        except (OSError, ValueError, KeyError, TypeError):
            return None


@dataclass(frozen=True)
class DataChange:
    """The difference between two records.

    Attributes:
        told: how many pieces were changed, added, removed and renamed, with the first names of each kind.
        keeps_rows: True where every row still holds the places it held, with other tokens in those of the
            changed documents; False where rows are cut or ordered anew; None: unknown.
    """

    told: str
    keeps_rows: bool | None

    @classmethod
    def between(cls, old: DataRecord | None, new: DataRecord | None) -> "DataChange":
        """Return the difference of the data that a run had and the data that it has now."""
        if old is None or new is None:
            return cls("what changed is not known, the run has no record of its data", None)
        keeps_rows = None if None in (old.layout, new.layout) else old.layout == new.layout
        level = max(old.level, new.level)
        before, now = (_at_level(record.entries, level) for record in (old, new))
        told = (_tell_pieces if level == 0 else _tell_groups)(before, now, new.noun)
        if told is None:
            how = "in another order" if keeps_rows is False else "read otherwise"
            told = f"the same {new.noun} {how}"
        return cls(told, keeps_rows)

    def effect(self, step: int) -> str:
        """Return what the change means for a run that has done `step` steps."""
        after = f"from step {step + 1:,} on"
        if self.keeps_rows:
            return f"{after} only the rows that hold these documents differ, all others stay as they were"
        order = "rows come from another order: some come again and others are left out"
        return f"{after} {order}" if self.keeps_rows is False else f"{after} perhaps {order}"


def layout_digest(parts: Iterable[object]) -> str:
    """Return a digest of what decides the places of rows: counts of tokens, digests of offsets."""
    state = xxhash.xxh3_128()
    for part in parts:
        state.update(f"{part}\n".encode())
    return state.hexdigest()


def _tell_pieces(before: list[Entry], now: list[Entry], noun: str) -> str | None:
    """Tell the pieces that differ by name; None where none does."""
    old, new = ({entry.first: entry for entry in entries} for entries in (before, now))
    changed = [name for name, entry in new.items() if name in old and old[name] != entry]
    added = [name for name in new if name not in old]
    removed = [name for name in old if name not in new]
    moved: dict[tuple[str, int], list[str]] = {}
    for name in removed:
        moved.setdefault((old[name].digest, old[name].size), []).append(name)
    renamed: dict[str, str] = {}
    for name in added:
        if places := moved.get((new[name].digest, new[name].size)):
            renamed[name] = places.pop(0)
    added = [name for name in added if name not in renamed]
    gone = set(renamed.values())
    removed = [name for name in removed if name not in gone]
    kinds = {
        "changed": changed,
        "added": added,
        "removed": removed,
        "renamed": [f"{was} is {name}" for name, was in renamed.items()],
    }
    told = [f"{_count(len(names), noun)} {kind} ({_listed(names)})" for kind, names in kinds.items() if names]
    return ", ".join(told) or None


def _tell_groups(before: list[Entry], now: list[Entry], noun: str) -> str | None:
    """Tell the groups of neighbours in which pieces differ; None where none does."""
    old, new = ({(entry.first, entry.pieces, entry.digest) for entry in entries} for entries in (before, now))
    gone = [entry for entry in before if (entry.first, entry.pieces, entry.digest) not in new]
    came = [entry for entry in now if (entry.first, entry.pieces, entry.digest) not in old]
    if not gone and not came:
        return None
    spans = [f"{entry.first} to {entry.last}" for entry in came or gone]
    counts = [sum(entry.pieces for entry in entries) for entries in (gone, came)]
    return (
        f"some of the {_count(counts[1], noun)} ({counts[0]:,} before) in {_listed(spans)} "
        f"were changed, added or removed"
    )


def _count(count: int, noun: str) -> str:
    return f"{count:,} {noun if count != 1 else noun.removesuffix('s')}"


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - NAMED:,} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more


def _begins(name: str, level: int) -> bool:
    """Return True where a new entry begins with the piece of this name."""
    hashed: int = xxhash.xxh3_64_intdigest(name.encode("utf-8", "surrogateescape"))
    return bool(hashed % 2**level == 0)


def _hash(entry: Entry) -> int:
    """Return the number that stands for an entry in the sum of several."""
    if entry.pieces > 1:
        return int(entry.digest, 16)
    text = f"{entry.first}\0{entry.size}\0{entry.digest}"
    return int(xxhash.xxh3_128_intdigest(text.encode("utf-8", "surrogateescape")))


def _join(left: Entry, right: Entry) -> Entry:
    digest = f"{(_hash(left) + _hash(right)) & _WORD:032x}"
    return Entry(left.first, right.last, left.pieces + right.pieces, left.size + right.size, digest)


def _at_level(entries: Iterable[Entry], level: int) -> list[Entry]:
    """Return the entries as they are at a higher level, where neighbours are joined."""
    joined: list[Entry] = []
    for entry in entries:
        if joined and not _begins(entry.first, level):
            joined[-1] = _join(joined[-1], entry)
        else:
            joined.append(entry)
    return joined
