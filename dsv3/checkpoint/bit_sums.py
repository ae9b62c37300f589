"""Checksums of tensors' bits, on the device that holds them: any change of one bit changes the sum.

A tensor is read as 32-bit words, laid out in rows of COLUMNS words. A sum is Σ row_i W_i + Σ column_j V_j,
modulo 2^64, where row_i and column_j are the sums of a row's and a column's words modulo 2^32. The weights
are pseudo-random, W odd and V even. So the sum of a tensor in which one word differs always differs: the
change times an odd number is no multiple of 2^64. Other changes, such as two words that are swapped, escape
with a chance of about 2^-64, but for those that leave every row's and every column's sum as it was.

The order in which a device adds does not matter, because integers wrap around. Two passes read the words and
nothing of their size is written, so a GPU takes two reads of its memory. One core of a CPU sums 7 GB/s
(benchmarks/replicas.py); PyTorch's sums in int64 reach 1 GB/s.
"""

from functools import cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

COLUMNS = 4096
"""Words per row."""

_COLUMN_SEED, _TAIL_SEED = 2**40, 2**41


class BitSums(NamedTuple):
    """The sums of a tensor's words by row and by column, and the words that fill no row."""

    rows: Tensor
    columns: Tensor
    tail: Tensor


class Place(NamedTuple):
    """The one element in which two tensors differ."""

    element: int
    """Its number in the flattened tensor."""
    bit: int | None
    """The bit of the element that differs, from 0, the lowest; None where several do."""


def words_of(tensor: Tensor) -> Tensor:
    """Return the bits of a tensor as flat int32 words.

    Where they fill no whole words, each element is a word of its own.
    """
    flat = tensor.detach().contiguous().reshape(-1)
    size = flat.element_size()
    if flat.nbytes % 4 == 0 and flat.storage_offset() * size % 4 == 0:
        return flat.view(torch.int32)
    return flat.view({1: torch.uint8, 2: torch.int16}[size]).to(torch.int32)


def bit_sums(words: Tensor) -> BitSums:
    """Return the sums of flat words."""
    rows = len(words) // COLUMNS
    whole = words[: rows * COLUMNS].view(rows, COLUMNS)
    # In int32: with another type PyTorch would first write a copy of all words in it.
    return BitSums(whole.sum(1, dtype=torch.int32), whole.sum(0, dtype=torch.int32), words[rows * COLUMNS :])


def checksum(words: Tensor) -> Tensor:
    """Return the checksum of flat words, an int64 scalar on their device."""
    found = bit_sums(words)
    terms = [
        (part.to(torch.int64) * weights(len(part), seed, words.device)).sum()
        for part, seed in zip(found, (0, _COLUMN_SEED, _TAIL_SEED), strict=True)
        if len(part)
    ]
    return torch.stack(terms).sum() if terms else torch.zeros((), dtype=torch.int64, device=words.device)


def weights(count: int, seed: int, device: torch.device) -> Tensor:
    """Return `count` int64 weights: even ones for columns, odd ones for all else."""
    longest = max(COLUMNS, 1 << (count - 1).bit_length())  # few lengths, so that few are made
    return _weights(longest, seed, device)[:count]


@cache
def _weights(count: int, seed: int, device: torch.device) -> Tensor:
    made = splitmix(np.arange(seed, seed + count, dtype=np.uint64))
    odd = np.uint64(seed != _COLUMN_SEED)
    made = (made & ~np.uint64(1)) | odd
    return torch.from_numpy(made.view(np.int64)).to(device)


def splitmix(numbers: np.ndarray) -> np.ndarray:
    """Return a pseudo-random 64-bit number for each (splitmix64)."""
    with np.errstate(over="ignore"):
        z = numbers * np.uint64(0x9E3779B97F4A7C15) + np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: np.ndarray = z ^ (z >> np.uint64(31))
    return mixed


def find_difference(own: BitSums, other: BitSums, tensor: Tensor) -> Place | None:
    """Return the element in which two tensors like `tensor` differ; None where it is more than one."""
    changes = [(b.to(torch.int64) - a.to(torch.int64)) for a, b in zip(own, other, strict=True)]
    rows, columns, tail = (change.nonzero().flatten().tolist() for change in changes)
    if (len(rows), len(columns), len(tail)) == (1, 1, 0):
        word, change = rows[0] * COLUMNS + columns[0], int(changes[0][rows[0]])
    elif (len(rows), len(columns), len(tail)) == (0, 0, 1):
        word, change = len(own.rows) * COLUMNS + tail[0], int(changes[2][tail[0]])
    else:
        return None
    size = tensor.element_size()
    if len(own.rows) * COLUMNS + len(own.tail) == tensor.numel() and size < 4:
        return Place(word, _bit(change))  # a word for each element
    bit = _bit(change)
    if bit is None:
        # Which of a word's elements is known only of those that are a word or more.
        return Place(word * 4 // size, None) if size >= 4 else None
    byte = word * 4 + bit // 8
    return Place(byte // size, byte % size * 8 + bit % 8)


def _bit(change: int) -> int | None:
    """Return the bit whose flip changes a word by `change`, modulo 2^32; None where several flipped."""
    change = min(change % 2**32, -change % 2**32)
    return change.bit_length() - 1 if change.bit_count() == 1 else None
