"""The token store: the documents of many files as one numbered sequence of documents and one of tokens.

A store holds a few numbers per file and nothing per document. Documents and tokens are numbered through all
files in their order; `position` is always the number of a token in the store.
"""

import hashlib
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, count, pairwise

import numpy as np

from dsv3.errors import UserError
from dsv3.tokens.file_array import ArrayLike
from dsv3.tokens.shuffle import Ids

STRETCHES = 64
"""Stretches of documents at most that a split sets aside."""

CHECKED_TOGETHER = 1 << 22
"""Tokens, or documents, that are read together to check them."""

WINDOW = 512
"""Documents whose offsets are read at once in a search: a page of the file."""


def _ignore(count: int) -> None:
    pass


@dataclass(frozen=True)
class Segment:
    """Consecutive documents of one file.

    Attributes:
        tokens: [tokens of the file], ids of any integer dtype.
        offsets: [documents of the file + 1], the place in `tokens` at which each document begins, and the end
            of the last one.
        first: the first document of the segment.
        end: the document behind the last one.
        name: the file, as messages name it.
        divisible: True for the one document of a file that does not say where documents begin: a split may
            cut it anywhere.
        bounds: the places in `tokens` at which the first document begins and the last one ends. Where an
            index has told them, no rank need open each file at start; None: they are read.
        vocab_size: the one that the index.json of the file tells, which ids lie below; None where none does.
    """

    tokens: ArrayLike
    offsets: ArrayLike
    first: int
    end: int
    name: str = ""
    divisible: bool = False
    bounds: tuple[int, int] | None = None
    vocab_size: int | None = None

    @property
    def num_documents(self) -> int:
        """Return the number of documents."""
        return self.end - self.first

    @property
    def offsets_name(self) -> str:
        """Return the file of the offsets, as messages name it."""
        return str(getattr(self.offsets, "path", self.name))

    def begin(self, document: int) -> int:
        """Return the place in `tokens` at which a document of the file begins."""
        return int(self.offsets[document : document + 1][0])

    def find(self, place: int) -> int:
        """Return the document of the segment that holds a place in `tokens`.

        Documents are of about equal size where many lie together, so that a few windows of WINDOW offsets,
        each a read of the file, lead to one among millions. At worst it is a search by halves.
        """
        low, high, guess = self.first, self.end, self.first
        low_begin, high_begin = self.begin(low), self.begin(high)
        for attempt in count():
            if attempt % 2:
                guess = (low + high) // 2
            else:
                guess = low + (high - low) * (place - low_begin) // max(1, high_begin - low_begin)
            left = max(low, min(guess - WINDOW // 2, high - WINDOW))
            known = self.offsets[left : min(left + WINDOW, high) + 1]
            if len(known) < 2 or (known[1:] < known[:-1]).any():
                raise UserError(
                    f"{self.offsets_name} is damaged: the offsets of documents {left} to "
                    f"{left + len(known) - 1} do not ascend"
                )
            if known[-1] <= place:
                low, low_begin = left + len(known) - 1, int(known[-1])
            elif known[0] > place:
                high, high_begin = left, int(known[0])
            else:
                return left + int(np.searchsorted(known, place, side="right")) - 1
        raise AssertionError


class TokenStore:
    """The documents of the segments, one after the other.

    A document may be empty; `find` never returns one. Segments without a token are left out.

    Args:
        segments: in the order of their documents.
        vocab_size: refuse ids outside 0 .. vocab_size - 1 when they are read; None takes any. An id beyond
            what the index.json of its file tells is refused in any case.
    """

    def __init__(self, segments: Iterable[Segment], vocab_size: int | None = None) -> None:
        known = [s if s.bounds else replace(s, bounds=(s.begin(s.first), s.begin(s.end))) for s in segments]
        bounds = [(segment, *segment.bounds) for segment in known if segment.bounds]
        bounds = [(segment, begin, end) for segment, begin, end in bounds if end > begin]
        self.segments: Sequence[Segment] = [segment for segment, _, _ in bounds]
        self.vocab_size = vocab_size
        self._begins = [begin for _, begin, _ in bounds]
        self._starts = [0, *accumulate(end - begin for _, begin, end in bounds)]
        self._documents = [0, *accumulate(s.num_documents for s in self.segments)]

    @classmethod
    def of(cls, tokens: ArrayLike, offsets: ArrayLike) -> "TokenStore":
        """Return the store of one array of tokens and one of offsets."""
        return cls([Segment(tokens, offsets, 0, len(offsets) - 1)])

    @property
    def num_tokens(self) -> int:
        """Return the number of tokens."""
        return self._starts[-1]

    @property
    def num_documents(self) -> int:
        """Return the number of documents."""
        return self._documents[-1]

    def find(self, position: int) -> int:
        """Return the document that holds the token at `position`, 0 <= position < num_tokens."""
        number = bisect_right(self._starts, position) - 1
        segment = self.segments[number]
        place = self._begins[number] + position - self._starts[number]
        return self._documents[number] + segment.find(place) - segment.first

    def offsets(self, first: int, end: int) -> Ids:
        """Return the positions at which documents first .. end begin, int64 [end - first + 1].

        0 <= first <= end <= num_documents; the last one is where document end - 1 ends.
        """
        if not self.segments:
            return np.zeros(1, np.int64)
        parts: list[Ids] = []
        number = min(bisect_right(self._documents, first), len(self.segments)) - 1
        while number < len(self.segments) and (self._documents[number] < end or not parts):
            segment, before = self.segments[number], self._documents[number]
            begin, stop = max(first - before, 0), min(end - before, segment.num_documents)
            places = self._ascending(number, segment.first + begin, segment.first + stop)
            parts.append(places[parts != [] :] + (self._starts[number] - self._begins[number]))
            number += 1
        return np.concatenate(parts) if len(parts) > 1 else parts[0]

    def read(self, position: int, count: int) -> Ids:
        """Return the `count` ids from `position` on, int64 [count]; all of them lie in the store.

        Raises:
            UserError: an id lies outside the vocabulary, or a file cannot be read any more.
        """
        number = bisect_right(self._starts, position) - 1
        segment, place = self.segments[number], self._begins[number] + position - self._starts[number]
        if position + count <= self._starts[number + 1]:  # as good as always
            return self._checked(segment, place, segment.tokens[place : place + count].astype(np.int64))
        parts, end = [], position + count
        while position < end:
            stop = min(end, self._starts[number + 1])
            parts.append(self.read(position, stop - position))
            position, number = stop, number + 1
        return np.concatenate(parts)

    def check(
        self,
        share: tuple[int, int] = (0, 1),
        limit: int | None = None,
        report: Callable[[int], None] = _ignore,
    ) -> None:
        """Read a share of the ids and offsets: each is checked as it is read.

        Args:
            share: (number, count), the part of the store that is read.
            limit: tokens, and documents, of which a larger part is only sampled, evenly; None reads all.
            report: gets the number of tokens and documents of each block that was read.

        Raises:
            UserError: as `read` and `offsets` do.
        """
        for total, read in (
            (self.num_tokens, lambda first, end: self.read(first, end - first)),
            (self.num_documents, self.offsets),
        ):
            first, end = (total * bound // share[1] for bound in (share[0], share[0] + 1))
            blocks = -(-(end - first) // CHECKED_TOGETHER)
            sampled = blocks if limit is None else min(blocks, -(-limit // CHECKED_TOGETHER))
            for number in range(sampled):
                begin = first + CHECKED_TOGETHER * (number * blocks // sampled)
                stop = min(begin + CHECKED_TOGETHER, end)
                read(begin, stop)
                report(stop - begin)

    def split(self, share: float, seed: int = 0) -> tuple["TokenStore", "TokenStore"]:
        """Return a training store and a held-out store of about `share` of the tokens.

        Up to STRETCHES stretches, one from each equal part of the store at a place that depends on `seed`
        alone, are held out. A document is held out where it begins in a stretch. Where none does, the one
        of STRETCHES documents from all over the store that is nearest in size is held out; a single
        document is cut. Equal documents are not looked for.
        """
        total, chosen = self.num_tokens, list[tuple[int, int]]()
        stretches = max(1, min(STRETCHES, round(total * share)))
        for stretch in range(stretches):
            first, end = (total * number // stretches for number in (stretch, stretch + 1))
            length = max(1, round((end - first) * share))
            drawn = hashlib.blake2b(f"{seed} {stretch}".encode(), digest_size=8).digest()
            begin = first + int.from_bytes(drawn, "little") % (end - first - length + 1)
            chosen += self._whole(begin, begin + length)
        held_out = [piece for piece in chosen if piece[0] < piece[1]]
        if not 0 < sum(end - begin for begin, end in held_out) < total:
            held_out = [self._nearest(max(1, round(total * share)))]
        return self._sides(held_out)

    def _sides(self, held_out: list[tuple[int, int]]) -> tuple["TokenStore", "TokenStore"]:
        """Return the store without the positions `held_out`, which ascend, and the store of them."""
        ends = [0, *(bound for piece in held_out for bound in piece), self.num_tokens]
        sides: tuple[list[Segment], list[Segment]] = ([], [])
        for number, (begin, end) in enumerate(pairwise(ends)):
            sides[number % 2].extend(self._cut(begin, end))
        return TokenStore(sides[0], self.vocab_size), TokenStore(sides[1], self.vocab_size)

    def _position(self, document: int) -> int:
        """Return the position at which a document begins, of `num_documents` the end of the store."""
        number = bisect_right(self._documents, document) - 1
        if number == len(self.segments):
            return self.num_tokens
        segment = self.segments[number]
        place = segment.begin(segment.first + document - self._documents[number])
        return place + self._starts[number] - self._begins[number]

    def _whole(self, begin: int, end: int) -> Iterator[tuple[int, int]]:
        """Yield the positions of the documents that begin at `begin` <= position < `end`.

        Of a segment that is divisible they are the positions themselves.
        """
        number = bisect_right(self._starts, begin) - 1
        while begin < end:
            stop = min(end, self._starts[number + 1])
            if self.segments[number].divisible:
                yield begin, stop
            else:
                yield self._next_document(begin), self._next_document(stop)
            begin, number = stop, number + 1

    def _next_document(self, position: int) -> int:
        """Return the first position from `position` on at which a document begins, or the store's end."""
        if position in (0, self.num_tokens):
            return position
        return self._position(self.find(position - 1) + 1)

    def _nearest(self, wanted: int) -> tuple[int, int]:
        """Return the positions of a document of about `wanted` tokens, of a single one its tail."""
        places = (self.num_tokens * number // STRETCHES for number in range(STRETCHES))
        sampled = {self.find(place) for place in (*places, self.num_tokens - 1)}
        sampled |= {self.num_documents * number // STRETCHES for number in range(STRETCHES)}
        sizes = [tuple(self.offsets(document, document + 1).tolist()) for document in sorted(sampled)]
        fitting = [(begin, end) for begin, end in sizes if 0 < end - begin < self.num_tokens]
        if not fitting:
            return self.num_tokens - wanted, self.num_tokens
        return min(fitting, key=lambda piece: abs(piece[1] - piece[0] - wanted))

    def _cut(self, begin: int, end: int) -> Iterator[Segment]:
        """Yield segments of the tokens at `begin` <= position < `end`; a document may be cut by them."""
        number = bisect_right(self._starts, begin) - 1
        while begin < end:
            segment, stop = self.segments[number], min(end, self._starts[number + 1])
            shift = self._begins[number] - self._starts[number]
            first, last = segment.find(begin + shift), segment.find(stop - 1 + shift)
            if segment.begin(first) == begin + shift and segment.begin(last + 1) == stop + shift:
                yield replace(segment, first=first, end=last + 1, bounds=(begin + shift, stop + shift))
            else:
                assert first == last
                known = (begin + shift, stop + shift)
                yield replace(segment, offsets=np.array(known), first=0, end=1, bounds=known)
            begin, number = stop, number + 1

    def _ascending(self, number: int, first: int, end: int) -> Ids:
        """Return the offsets of documents first .. end of a file; UserError where they cannot be."""
        segment = self.segments[number]
        places = segment.offsets[first : end + 1].astype(np.int64)
        low, high = (
            self._begins[number],
            self._begins[number] + self._starts[number + 1] - self._starts[number],
        )
        if places[0] < low or places[-1] > high or (places[1:] < places[:-1]).any():
            wrong = (places < low) | (places > high)
            wrong[1:] |= places[1:] < places[:-1]
            place = int(np.argmax(wrong))
            before = places[max(place - 1, 0)]
            raise UserError(
                f"{segment.offsets_name} is damaged: document {first + place} begins at token "
                f"{places[place]}, "
                f"the one before at {before}, all lie in {low} to {high}"
            )
        return places

    def _checked(self, segment: Segment, place: int, ids: Ids) -> Ids:
        own, sizes = segment.vocab_size, (self.vocab_size, segment.vocab_size)
        size = min((known for known in sizes if known is not None), default=None)
        if size is not None and len(ids) and (ids.min() < 0 or ids.max() >= size):
            index = int(np.argmax((ids < 0) | (ids >= size)))
            found = f"{segment.name}: token {place + index} is the id {ids[index]}"
            if size == own:
                raise UserError(
                    f"{found}, and its index.json says vocab_size={own}, which ids lie below: "
                    "the file is damaged or of another tokenizer, or index.json is wrong"
                )
            raise UserError(f"{found}, the model's vocabulary is 0 to {size - 1} (model.vocab_size={size})")
        return ids
