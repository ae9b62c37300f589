"""Rows of a stream of documents that is read in lanes: the batch follows from (seed, step) on any world size.

A stream has no number of tokens and no place that can be looked up, so that no row is known without the rows
before it. The dataset is therefore cut into lanes by its files, and a lane supplies the same slots of every
global batch. Rank r takes the r-th part of the batch and reads the lanes of that part alone. A row is still a
function of its number: it can always be had by reading its lane from the begin on. Bookmarks, a few integers
per lane that a checkpoint carries, spare that.
"""

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from copy import deepcopy
from itertools import count
from typing import NamedTuple, Protocol, TypeGuard

import numpy as np

from dsv3.data.packing import PADDING, PackedRow
from dsv3.documents.skip_limit import Reason, Skipped, skipped_lines
from dsv3.errors import UserError
from dsv3.metrics.progress import amount
from dsv3.tokens.document_encoder import DocumentEncoder, document_ends
from dsv3.tokens.shuffle import Ids, permutation
from dsv3.tokens.tokenizer import Tokenizer

BLOCK_CHARACTERS = 8 << 20
"""Characters at which a block of shuffled documents ends: what a lane holds of the text."""

ENCODED_CHARACTERS = 1 << 18
"""Characters that are encoded together: enough to keep the cores busy."""

KEPT_BATCHES = 64
"""Batches whose bookmarks are kept: how far the loader may read ahead of the step that a checkpoint saves."""


class Bookmark(NamedTuple):
    """The place in a lane at which a row begins, as integers that a checkpoint carries."""

    row: int
    """The number of the row in its lane."""
    epoch: int
    piece: int
    """Pieces of the lane that the epoch has done with."""
    document: int
    """The document of the piece at which its current block begins, by its number among all of the piece."""
    place: int
    """Documents of the block that are done with."""
    token: int
    """Tokens of the current document that are done with."""


class Pieces(Protocol):
    """A dataset in pieces, such as files, each of which is read from its begin on."""

    @property
    def num_pieces(self) -> int:
        """Return the number of pieces."""

    def texts(self, piece: int, first: int = 0) -> Iterator[tuple[int, str | None]]:
        """Yield number and text of the rows of a piece from number `first` on; None where there is none."""

    def place(self, piece: int, number: int) -> str:
        """Return where a document of a piece stands, for messages."""


def is_document(text: str | None) -> TypeGuard[str]:
    """Return whether a row of a stream is a document: it has text, and no NUL character, as in files."""
    return bool(text) and text is not None and "\0" not in text


class LanePart(NamedTuple):
    """The documents of a piece whose number modulo `parts` is `part`."""

    piece: int
    part: int
    parts: int


def lane_parts(num_pieces: int, lane: int, lanes: int) -> list[LanePart]:
    """Return what a lane reads: the pieces lane, lane + lanes, ...; of fewer pieces a part of one."""
    if num_pieces >= lanes:
        return [LanePart(piece, 0, 1) for piece in range(lane, num_pieces, lanes)]
    piece = lane % num_pieces
    return [LanePart(piece, lane // num_pieces, len(range(piece, lanes, num_pieces)))]


class LaneOptions(NamedTuple):
    """The numbers by which all lanes are read."""

    lanes: int
    lane_rows: int
    """Consecutive rows of a batch that one lane supplies."""
    sequence_length: int
    seed: int | None
    """None keeps the order of the dataset."""
    shuffled_documents: int
    """Documents at most that are shuffled among one another."""


class Lane:
    """One lane, read from a bookmark on.

    Args:
        takes: says whether a document is trained on; held-out ones are not.
    """

    def __init__(
        self,
        pieces: Pieces,
        number: int,
        options: LaneOptions,
        encoder: DocumentEncoder,
        takes: Callable[[str], bool],
        start: Bookmark,
    ) -> None:
        self._pieces, self._number, self._options = pieces, number, options
        self._encoder, self._takes = encoder, takes
        self._parts = lane_parts(pieces.num_pieces, number, options.lanes)
        self._ends = document_ends(encoder.tokenizer)
        self._token = start.token
        self._waiting: deque[tuple[Bookmark, Ids]] = deque()
        self._documents = self._read(start)
        self.next_row = start.row
        self.skipped = Skipped()
        """Counts of the rows read so far, each once: of the first epoch that is read, from `start` on."""
        self._counted_epoch = start.epoch

    def read(self) -> tuple[Bookmark, PackedRow]:
        """Return the next row, and the place at which it begins."""
        length = self._options.sequence_length + 1
        tokens, documents = np.empty(length, np.int64), np.full(length, PADDING, np.int32)
        filled = number = 0
        while filled < length:
            if number == len(self._waiting):
                self._waiting.append(next(self._documents))
            ids = self._waiting[number][1]
            begin = self._token if number == 0 else 0
            taken = ids[begin : begin + length - filled]
            tokens[filled : filled + len(taken)] = taken
            documents[filled : filled + len(taken)] = number
            filled, number = filled + len(taken), number + 1
        place = self._waiting[0][0]._replace(row=self.next_row, token=self._token)
        # The last token is the first of the next row.
        done = self._token + self._options.sequence_length
        while done >= len(self._waiting[0][1]):
            done -= len(self._waiting.popleft()[1])
        self._token = done
        self.next_row += 1
        return place, PackedRow(tokens, documents)

    def _read(self, start: Bookmark) -> Iterator[tuple[Bookmark, Ids]]:
        """Yield the documents from a bookmark on, each with its place, without end."""
        seed, number = self._options.seed, self._number
        for epoch in count(start.epoch):
            order: Sequence[int] = range(len(self._parts))
            if seed is not None:
                order = permutation(len(self._parts), seed, epoch, 4, number).tolist()
            found = False
            for piece in range(start.piece, len(order)):
                part = self._parts[order[piece]]
                for first, texts in self._blocks(part, start.document, epoch == self._counted_epoch):
                    found = True
                    if seed is not None:
                        places = permutation(len(texts), seed, epoch, 5, number, part.piece, first)
                        texts = [texts[place] for place in places]
                    for place, ids in self._encode(texts, start.place):
                        if len(ids):
                            yield Bookmark(0, epoch, piece, first, place, 0), ids
                    start = start._replace(place=0)
                start = start._replace(document=0)
            if not found and start.piece == 0:
                raise UserError(
                    f"lane {number} of data.lanes={self._options.lanes} has no document to train on: "
                    "use fewer lanes, or data=text for little text"
                )
            start = start._replace(piece=0)

    def _blocks(self, part: LanePart, first: int, counts: bool) -> Iterator[tuple[int, list[str]]]:
        """Yield the documents of a part from number `first` on in blocks, with the number each begins at.

        With `counts` rows are counted, also those that are left out.
        """
        texts: list[str] = []
        begin = size = 0
        for number, text in self._pieces.texts(part.piece, first):
            if number % part.parts != part.part:
                continue
            if counts:
                self._count(part.piece, number, text)
            if not is_document(text) or not self._takes(text):
                continue
            begin = begin if texts else number
            texts.append(text)
            size += len(text)
            if len(texts) == self._options.shuffled_documents or size >= BLOCK_CHARACTERS:
                yield begin, texts
                texts, size = [], 0
        if texts:
            yield begin, texts

    def _count(self, piece: int, number: int, text: str | None) -> None:
        if is_document(text):
            self.skipped.documents += 1
        elif text == "":
            self.skipped.empty += 1
        else:
            reason = Reason.NO_TEXT if text is None else Reason.NUL
            known = reason in self.skipped.first
            self.skipped.add(reason, "" if known else self._pieces.place(piece, number))

    def _encode(self, texts: Sequence[str], first: int) -> Iterator[tuple[int, Ids]]:
        """Yield the place and the ids of the texts from place `first` on, bos and eos with them."""
        group: list[int] = []
        size = 0
        for place in range(first, len(texts)):
            group.append(place)
            size += len(texts[place])
            if size >= ENCODED_CHARACTERS or place + 1 == len(texts):
                yield from zip(group, self._encode_group([texts[each] for each in group]), strict=True)
                group, size = [], 0

    def _encode_group(self, texts: Iterable[str]) -> Iterator[Ids]:
        windows = [window for text in texts for window in self._encoder.windows([text])]
        before, after = self._ends
        document = list(before)
        for window, ids in zip(windows, self._encoder.encode(windows), strict=True):
            document += ids
            if window.last:
                yield np.array(document + after, np.int64)
                document = list(before)


class LaneRows:
    """Training rows of a stream of documents, without end; row s belongs to a slot of every global batch.

    Lane and place of row s follow from s, the number of lanes and the rows per lane and batch. Reading the
    rows of a lane in their order costs what they hold; any other order reads the lane again.
    """

    def __init__(
        self, pieces: Pieces, options: LaneOptions, tokenizer: Tokenizer, takes: Callable[[str], bool]
    ) -> None:
        self.sequence_length = options.sequence_length
        self._pieces, self._options, self._takes = pieces, options, takes
        self._encoder = DocumentEncoder(tokenizer)
        self._lanes: dict[int, Lane] = {}
        self._stored: dict[int, Bookmark] = {}
        self._recent: dict[int, deque[Bookmark]] = {}
        self._lock = threading.RLock()  # rows are read in the background, bookmarks saved between two steps

    def __len__(self) -> int:
        """Return a number beyond any: how many rows an epoch has is not known before it is over."""
        return 2**62

    def row(self, index: int) -> PackedRow:
        """Return the row at `index` >= 0.

        Raises:
            UserError: the dataset is not what it was, or has no documents for a lane.
            RunFailed: the dataset cannot be read any more.
        """
        number, wanted = self._locate(index)
        with self._lock:
            lane = self._lanes.get(number)
            if lane is None or lane.next_row > wanted:
                start = self._bookmark_before(number, wanted)
                lane = Lane(self._pieces, number, self._options, self._encoder, self._takes, start)
                self._lanes[number] = lane
            assert lane.next_row <= wanted
            while True:
                try:
                    place, row = lane.read()
                except BaseException:
                    del self._lanes[number]  # it has lost its place
                    raise
                kept = self._recent.setdefault(number, deque(maxlen=KEPT_BATCHES * self._options.lane_rows))
                if not kept or kept[-1].row < place.row:
                    kept.append(place)
                if place.row == wanted:
                    return row

    def bookmarks(self, samples: int) -> dict[int, Bookmark]:
        """Return by lane, as far as known, a place from which the rows from sample `samples` on are read."""
        with self._lock:
            known = {*self._stored, *self._recent}
            return {number: self._bookmark_before(number, self._first(number, samples)) for number in known}

    def skipped(self) -> dict[int, Skipped]:
        """Return by lane what was read and left out since the lane was opened."""
        with self._lock:
            return {number: deepcopy(lane.skipped) for number, lane in self._lanes.items()}

    def go_on(self, bookmarks: Mapping[int, Sequence[int]]) -> None:
        """Take the bookmarks that a checkpoint carries; without one a lane is read from its begin on."""
        with self._lock:
            self._stored = {lane: Bookmark(*place) for lane, place in bookmarks.items()}
            self._lanes.clear()
            self._recent.clear()

    def _bookmark_before(self, number: int, row: int) -> Bookmark:
        """Return the last known place of a lane that is not behind a row of it."""
        places = [Bookmark(0, 0, 0, 0, 0, 0), *self._recent.get(number, ())]
        places += [self._stored[number]] if number in self._stored else []
        best: Bookmark = max(place for place in places if place.row <= row)
        return best

    def _locate(self, index: int) -> tuple[int, int]:
        """Return the lane of a row, and its number there."""
        rows = self._options.lane_rows
        batch, slot = divmod(index, rows * self._options.lanes)
        return slot // rows, batch * rows + slot % rows

    def _first(self, number: int, samples: int) -> int:
        """Return the first row of a lane that is not among the first `samples` rows of all."""
        rows = self._options.lane_rows
        batch, slot = divmod(samples, rows * self._options.lanes)
        return batch * rows + min(max(slot - number * rows, 0), rows)


def newest(bookmarks: Iterable[Mapping[int, Bookmark]]) -> dict[int, Bookmark]:
    """Return of each lane the last place that any of several processes knows."""
    merged: dict[int, Bookmark] = {}
    for each in bookmarks:
        for number, place in each.items():
            merged[number] = max(place, merged.get(number, place))
    return merged


def left_out(found: Iterable[Mapping[int, Skipped]]) -> Skipped:
    """Return the counts of all lanes; of one that several processes read those of who is furthest."""
    lanes: dict[int, Skipped] = {}
    for each in found:
        for number, skipped in each.items():
            lanes[number] = max(skipped, lanes.get(number, skipped), key=lambda one: one.documents)
    total = Skipped()
    for number in sorted(lanes):
        total.merge(lanes[number])
    return total


def left_out_line(skipped: Skipped) -> str:
    """Return a line on the rows of a stream that are no documents, by reason; empty where all are."""
    rows = skipped.num_skipped + skipped.empty
    if not rows:
        return ""
    reasons = [f"{skipped.empty:,} empty"] * bool(skipped.empty)
    reasons += [line.removeprefix("skipped ") for line in skipped_lines(skipped)]
    told = "; ".join(reasons)
    return f"data=hf: {rows:,} of {amount(rows + skipped.documents, 'rows')} read so far are left out: {told}"
