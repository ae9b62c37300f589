"""Count what is skipped while documents are read: told by reason, refused beyond data.max_skipped."""

import math
from dataclasses import dataclass, field
from typing import Any

from dsv3.errors import UserError
from dsv3.metrics.progress import amount

EARLY = 10_000
"""Documents after which too many are refused before everything was read."""


REASONS_NAMED = 3
"""Reasons that an error names, each with its first place, which may be a long path; a table names all."""


class Reason:
    """Reasons to skip a document or a file, as they are counted and shown."""

    NOT_UTF8 = "not UTF-8"
    NUL = "NUL characters (no text)"
    ARCHIVE = "an archive or compressed in a way that is not read"
    UNREADABLE = "unreadable files"
    DAMAGED = "damaged or truncated files"
    NO_JSON = "no JSON"
    NO_OBJECT = "JSON, but no object"
    NO_FIELD = "the field is missing"
    NO_TEXT = "the field holds no text"
    LONE_SURROGATE = "half a character (a lone surrogate)"


OF_FILES = (Reason.ARCHIVE, Reason.UNREADABLE, Reason.DAMAGED)
"""Reasons that concern a file with all that it holds, of which the number of documents is not known."""


class BadDocument(Exception):
    """A document turned out to be none after pieces of it were given; it is counted already."""


@dataclass
class Skipped:
    """Counts of what was read: documents given, and what was skipped.

    Attributes:
        counts: documents skipped, by reason.
        files: files skipped wholly or from a place on, by reason.
        first: the first place of each reason.
        documents: documents that were given and turned out good.
        empty: documents without a character, which are left out and are no mistake.
    """

    counts: dict[str, int] = field(default_factory=dict)
    files: dict[str, int] = field(default_factory=dict)
    first: dict[str, str] = field(default_factory=dict)
    documents: int = 0
    empty: int = 0

    def add(self, reason: str, where: str, count: int = 1) -> None:
        """Count documents, or a file where `reason` is one of files."""
        counts = self.files if reason in OF_FILES else self.counts
        counts[reason] = counts.get(reason, 0) + count
        self.first.setdefault(reason, where)

    def bad(self, reason: str, where: str) -> BadDocument:
        """Count a document of which pieces were given, and return the exception that says so."""
        self.add(reason, where)
        return BadDocument(reason)

    def merge(self, other: "Skipped") -> None:
        """Add the counts of another reading, which comes later in the order of the files."""
        for mine, more in ((self.counts, other.counts), (self.files, other.files)):
            for reason, count in more.items():
                mine[reason] = mine.get(reason, 0) + count
        self.first = {**other.first, **self.first}
        self.documents += other.documents
        self.empty += other.empty

    @property
    def num_skipped(self) -> int:
        """Return the documents skipped, files not counted."""
        return sum(self.counts.values())

    def to_json(self) -> dict[str, Any]:
        """Return the counts for a journal."""
        return dict(vars(self))

    @classmethod
    def from_json(cls, found: dict[str, Any]) -> "Skipped":
        """Return the counts that `to_json` gave."""
        return cls(**found)


def skipped_lines(skipped: Skipped, most: int | None = None) -> list[str]:
    """Return a line per reason, with the first place that has it; `most` of them, the most frequent first."""
    found = [
        (count, f"skipped {amount(count, noun)}: {reason}, first {skipped.first.get(reason, '?')}")
        for noun, counts in (("documents", skipped.counts), ("files", skipped.files))
        for reason, count in counts.items()
    ]
    if most is None or len(found) <= most:
        return [line for _, line in found]
    found.sort(key=lambda each: -each[0])
    return [*(line for _, line in found[:most]), f"and {len(found) - most} more reasons"]


def require_few_skipped(
    skipped: Skipped, files: int, limit: float, title: str, at_end: bool = True, field: str | None = None
) -> None:
    """Raise UserError where more than a share of the documents, or of the files, was skipped.

    Args:
        files: all files, of which `skipped.files` cannot be read.
        limit: data.max_skipped, the largest share.
        title: what was read, as in `data.path=FOLDER`.
        at_end: everything was read; else a few documents say nothing of the rest.
        field: data.field, to be named where it is missing.
    """
    bad, unread = skipped.num_skipped, sum(skipped.files.values())
    shares = [
        (bad / max(1, bad + skipped.documents), f"{bad:,} of {amount(bad + skipped.documents, 'documents')}"),
        (unread / max(1, files), f"{unread:,} of {amount(files, 'files')}"),
    ]
    share, told = max(shares)
    if share <= limit or not (at_end or bad + skipped.documents >= EARLY or unread > limit * files):
        return
    reasons = ", ".join(line.removeprefix("skipped ") for line in skipped_lines(skipped, REASONS_NAMED))
    enough = math.ceil(100 * share) / 100
    mend = "Mend or remove them"
    if field is not None and 2 * skipped.counts.get(Reason.NO_FIELD, 0) > bad + unread:
        mend = f"Name the field that holds the text (data.field={field} now)"
    others = f", or read the others alone: data.max_skipped={enough:g}" if share < 1 else ""
    raise UserError(
        f"{title}: {told} cannot be read, more than data.max_skipped={limit:g} allows ({reasons})\n"
        f"{mend}{others}"
    )
