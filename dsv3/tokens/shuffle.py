"""Shuffling: any place of a permutation in constant time and memory, and small permutations as a whole.

Ten terabytes of text are 6e8 rows of 4,096 tokens. A permutation of their numbers takes 5 GB, and more than a
minute, on each rank and for each epoch. `Permutation` holds 16 keys, and takes 5 microseconds for each number
that is asked for.
"""

import hashlib
import math
import struct
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Ids = npt.NDArray[np.int64]

Words = npt.NDArray[np.uint64]

_ROUNDS = 16

_WORD = 2**64 - 1


def permutation(count: int, *seeds: int) -> Ids:
    """Return the permutation of `count` items that the seeds define, for counts of some thousands.

    It sorts raw draws instead of calling Generator.permutation, because numpy promises the same stream in
    every version only for its bit generators (NEP 19), and a run may outlive a version.
    """
    draws = np.random.Philox(np.random.SeedSequence(seeds)).random_raw(count)
    order = np.argsort(draws)  # a quarter of a stable sort's time
    in_order = draws[order]
    has_ties = bool((in_order[1:] == in_order[:-1]).any())
    return np.argsort(draws, kind="stable") if has_ties else order


class Permutation(Sequence[int]):
    """The permutation of the numbers below `count` that the seeds define; nothing of it is stored.

    A generalized Feistel network (Black and Rogaway, "Ciphers with arbitrary finite domains", CT-RSA 2002):
    a number is a pair of digits below a and b, with a x b hardly above `count`. Each round adds a keyed hash
    of one digit to the other, which subtraction undoes, so that no two numbers meet. A result beyond `count`
    goes through the network again, until it lies below.
    """

    def __init__(self, count: int, *seeds: int) -> None:
        self._count = count
        self._low = max(1, math.isqrt(count - 1) + 1) if count > 1 else 1
        self._high = -(-count // self._low)
        digest = hashlib.shake_256(repr(seeds).encode()).digest(8 * _ROUNDS)
        self._keys = struct.unpack(f"<{_ROUNDS}Q", digest)

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, place: int) -> int:  # type: ignore[override]  # slices would be lists
        """Return the number at `place`, 0 <= place < count."""
        if not 0 <= place < self._count:
            raise IndexError(f"place {place} of a permutation of {self._count}")
        number = self._rounds(place)
        while number >= self._count:
            number = self._rounds(number)
        return number

    def block(self, first: int, end: int) -> Ids:
        """Return the numbers at the places first .. end - 1 together: faster, int64 [end - first]."""
        found = self._rounds_of(np.arange(first, end, dtype=np.uint64))
        while (beyond := np.flatnonzero(found >= self._count)).size:
            found[beyond] = self._rounds_of(found[beyond])
        return found.astype(np.int64)

    def _rounds(self, number: int) -> int:
        """Send a number below a x b through the network once."""
        high, low = divmod(number, self._low)
        for round_number, key in enumerate(self._keys):
            if round_number % 2:
                high = (high + mix(low ^ key)) % self._high
            else:
                low = (low + mix(high ^ key)) % self._low
        return high * self._low + low

    def _rounds_of(self, numbers: Words) -> Words:
        """Do the same with many numbers; a sum of two digits stays below 2^64 where each is reduced first."""
        high, low = np.divmod(numbers, np.uint64(self._low))
        for round_number, key in enumerate(np.array(self._keys, np.uint64)):
            if round_number % 2:
                high = (high + mix_array(low ^ key) % np.uint64(self._high)) % np.uint64(self._high)
            else:
                low = (low + mix_array(high ^ key) % np.uint64(self._low)) % np.uint64(self._low)
        return high * np.uint64(self._low) + low


def mix(word: int) -> int:
    """Hash 64 bits to 64 bits: the finalizer of SplitMix64 (Steele, Lea, Flood, OOPSLA 2014)."""
    word = ((word ^ word >> 30) * 0xBF58476D1CE4E5B9) & _WORD
    word = ((word ^ word >> 27) * 0x94D049BB133111EB) & _WORD
    return word ^ word >> 31


def mix_array(words: Words) -> Words:
    """Hash each word of an array as `mix` does."""
    words = (words ^ words >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ words >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return words ^ words >> np.uint64(31)


class SplitRows(Sequence[int]):
    """The numbers below `count` on one side of a split that sets `held_out` of them aside, in their order.

    The numbers are cut into `held_out` stretches of equal length, give or take one, and one number of each is
    held out, at a place that depends on the seeds alone. So the held-out numbers come from everywhere, and
    the k-th number of either side is known without a table of them.
    """

    def __init__(self, count: int, held_out: int, is_held_out: bool, *seeds: int) -> None:
        assert 0 < held_out < count
        self._count, self._stretches, self._is_held_out = count, held_out, is_held_out
        digest = hashlib.blake2b(repr(seeds).encode(), digest_size=8).digest()
        self._key = int.from_bytes(digest, "little")

    def __len__(self) -> int:
        return self._stretches if self._is_held_out else self._count - self._stretches

    def __getitem__(self, place: int) -> int:  # type: ignore[override]  # slices would be lists
        """Return the number at `place`, 0 <= place < len."""
        if not 0 <= place < len(self):
            raise IndexError(f"place {place} of {len(self)} rows")
        if self._is_held_out:
            return self._chosen(place)
        # Before stretch s lie s x count // stretches numbers, of which s are held out.
        stretch = ((place + 1) * self._stretches - 1) // len(self)
        number = place + stretch
        return number + (number >= self._chosen(stretch))

    def _chosen(self, stretch: int) -> int:
        """Return the number that is held out of a stretch."""
        first, end = (index * self._count // self._stretches for index in (stretch, stretch + 1))
        return first + mix(stretch ^ self._key) % (end - first)
