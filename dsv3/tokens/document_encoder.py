"""Encode documents of any length with bounded memory: long ones in windows, with the ids of the whole.

A window ends where a tokenizer starts afresh: behind a line, else before a word. Whether it does is tried at
every cut with the tokenizer at hand, and a window is encoded together with the last characters before it,
whose ids are dropped. A tokenizer that puts something before every text, as Llama 2's does, so puts it before
the document alone.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import NamedTuple

from dsv3.tokens.tokenizer import SAFE_BREAK, Tokenizer

WINDOW = 1 << 18
"""Characters that a window of a long document has at least; a tokenizer needs 100 bytes per id."""

CONTEXT = 128
"""Characters on either side of a cut that are encoded to try it."""

TRIES = 8
"""Cuts of each kind that are tried."""

_WORD_BREAK = re.compile(r"(?<=\S)(?=[ ]\S)")
"""Between a word and the space before the next one, which byte-level tokenizers take as its beginning."""


class Window(NamedTuple):
    """A stretch of a document.

    Attributes:
        context: the characters before `text`, which are encoded with it; empty for the first window.
        last: the document ends here.
    """

    text: str
    context: str
    last: bool


class DocumentEncoder:
    """Cuts documents into windows and encodes these, many at once.

    Attributes:
        blind_cuts: windows that had to end where the tokenizer may not start afresh: WINDOW characters
            without a line end or a space.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.blind_cuts = 0

    def windows(self, pieces: Iterable[str]) -> Iterator[Window]:
        """Yield the windows of one document; where they end follows from its text alone."""
        waiting: list[str] = []
        size, context = 0, ""
        for piece in pieces:
            waiting.append(piece)
            size += len(piece)
            if size > 2 * WINDOW:
                text = "".join(waiting)
                begin = 0
                while len(text) - begin > 2 * WINDOW:  # leaves room to look for a cut
                    end = self._cut(text, begin)
                    yield Window(text[begin:end], context, False)
                    context = text[max(end - CONTEXT, 0) : end]
                    begin = end
                waiting, size = [text[begin:]], len(text) - begin
        yield Window("".join(waiting), context, True)

    def encode(self, windows: Sequence[Window]) -> list[list[int]]:
        """Return the ids of each window, without bos and eos."""
        ids = self.tokenizer.encode_batch(
            [window.context + window.text if window.context else window.text for window in windows]
        )
        inner = [number for number, window in enumerate(windows) if window.context]
        contexts = self.tokenizer.encode_batch([windows[number].context for number in inner])
        for number, context in zip(inner, contexts, strict=True):
            ids[number] = ids[number][len(context) :]
        return ids

    def _cut(self, text: str, begin: int) -> int:
        """Return where the window that begins at `begin` ends: WINDOW to 2 x WINDOW characters further on."""
        near, far = begin + WINDOW, begin + 2 * WINDOW
        for kind in (SAFE_BREAK, _WORD_BREAK):
            for found in islice(kind.finditer(text, near, far), TRIES):
                if self._starts_afresh(text, found.start()):
                    return found.start()
        self.blind_cuts += 1
        return near

    def _starts_afresh(self, text: str, cut: int) -> bool:
        """Return whether no id covers the characters on both sides of a cut."""
        before = text[max(cut - CONTEXT, 0) : cut]
        alone, whole = self.tokenizer.encode_batch([before, before + text[cut : cut + CONTEXT]])
        return whole[: len(alone)] == alone


def document_ends(tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """Return the ids that stand before and behind those of a document's text: bos and eos, if any.

    eos ends every document, also where add_eos_token is false: that key speaks of prompts, and a model learns
    from documents where to stop.
    """
    bos = [tokenizer.bos] if tokenizer.bos is not None and tokenizer.add_bos else []
    return bos, [] if tokenizer.eos is None else [tokenizer.eos]
