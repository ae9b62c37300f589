"""Fill-in-the-middle: some documents are rearranged so that the model learns to write a middle.

The form is PSM (prefix, suffix, middle), as in the DeepSeek-V3 report, section 4.1, on whole documents before
they are packed:

    [bos] <|fim_begin|> prefix <|fim_hole|> suffix <|fim_end|> middle [eos]

The cuts lie between tokens, and documents are rearranged when a row is read. So a chosen document has
exactly ADDED_TOKENS more tokens, whatever its cuts: positions in the stream stay a closed form, nothing is
stored, and every epoch chooses other documents and other cuts. A cut between characters would need the
tokenizer in the loader, and the length of a document would be known only after it is tokenized anew. The
price: a model that is trained so sees no prefix which ends inside a token, as the text before a cursor may
(Bavarian et al., "Efficient Training of Language Models to Fill in the Middle", 2022, compare the two).
"""

import hashlib
from fractions import Fraction
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from dsv3.tokens.shuffle import Ids, permutation
from dsv3.tokens.token_store import TokenStore

ADDED_TOKENS = 3


class FimTokens(NamedTuple):
    """The ids around the parts, and those that begin and end a document and stay where they are."""

    begin: int
    hole: int
    end: int
    bos: int | None = None
    eos: int | None = None


class FillInMiddle:
    """Chooses the documents to rearrange, and reads them.

    Of the first d documents floor(rate x d) are chosen, at every bound of a block of documents: which of a
    block is a keyed permutation of it.

    Args:
        rate: the share of documents, 0 <= rate <= 1, taken as the decimal number that it is printed as.
        seed: chooses documents and cuts.
        every_epoch_anew: False chooses the same documents in every epoch; the cuts are new in any case.
    """

    def __init__(self, rate: float, tokens: FimTokens, seed: int, every_epoch_anew: bool = True) -> None:
        self._rate = Fraction(repr(rate))
        self._tokens = tokens
        self._seed = seed
        self._every_epoch_anew = every_epoch_anew

    @property
    def identity(self) -> str:
        """Return what decides which documents are rearranged, where it is the same ones in every epoch."""
        return f"{self._rate} {self._seed}"

    def rearranged_before(self, document: int) -> int:
        """Return the number of chosen documents below `document`, the first of a block or the end."""
        return document * self._rate.numerator // self._rate.denominator

    def choose(self, first: int, end: int, epoch: int) -> npt.NDArray[np.bool_]:
        """Return which documents of the block first .. end - 1 are rearranged, bool [end - first]."""
        count = self.rearranged_before(end) - self.rearranged_before(first)
        chosen = np.zeros(end - first, np.bool_)
        order = permutation(end - first, self._seed, epoch if self._every_epoch_anew else 0, 3, first)
        chosen[order[:count]] = True
        return chosen

    def read(self, store: TokenStore, begin: int, length: int, epoch: int, skip: int, count: int) -> Ids:
        """Return `count` ids, from the id `skip` on, of the rearranged form of a document.

        The document has `length` ids from position `begin` of the store on, its form ADDED_TOKENS more.
        """
        tokens, end = self._tokens, begin + length
        has_bos = length > 0 and int(store.read(begin, 1)[0]) == tokens.bos
        has_eos = length > has_bos and int(store.read(end - 1, 1)[0]) == tokens.eos
        inner, inner_end = begin + has_bos, end - has_eos
        hole, hole_end = self._cuts(inner, inner_end, epoch)
        # A part is an id, or bounds of positions in the store.
        parts = (
            (begin, inner),
            tokens.begin,
            (inner, hole),
            tokens.hole,
            (hole_end, inner_end),
            tokens.end,
            (hole, hole_end),
            (inner_end, end),
        )
        read, place, stop = [], 0, skip + count
        for part in parts:
            first, last = (part, part + 1) if isinstance(part, int) else part
            low, high = max(skip - place, 0), min(stop - place, last - first)
            if low < high:
                read.append(np.array([part]) if part is first else store.read(first + low, high - low))
            place += last - first
        return np.concatenate(read)

    def _cuts(self, first: int, end: int, epoch: int) -> tuple[int, int]:
        """Return where the middle begins and ends: two places drawn evenly from first .. end."""
        content = f"{self._seed} {epoch} {first}".encode()
        draws = hashlib.blake2b(content, digest_size=16).digest()
        places = (int.from_bytes(draws[half : half + 8], "little") % (end - first + 1) for half in (0, 8))
        low, high = sorted(places)
        return first + low, first + high
