from typing import Any

import pytest

from dsv3.config.convert import parse_size
from dsv3.errors import UserError


@pytest.mark.parametrize(
    ("value", "size"),
    [
        (1, 1),
        (5_000_000_000, 5_000_000_000),
        ("4096", 4096),
        ("12B", 12),
        ("5GB", 5 * 10**9),
        ("500MB", 500 * 10**6),
        ("2GiB", 2 * 1024**3),
        ("3KiB", 3 * 1024),
        ("1TB", 10**12),
        ("1TiB", 1024**4),
        ("5gb", 5 * 10**9),
        (" 2.5 GB ", 2_500_000_000),
        ("0.1GB", 100_000_000),
    ],
)
def test_sizes_are_bytes(value: str | int, size: int) -> None:
    assert parse_size(value) == size


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("5G", "must be bytes, or a number with one of B, KB, KiB, .*Did you mean '5GB'?"),
        ("5GBB", "Did you mean '5GB'?"),
        ("2 Mib/s", "must be bytes"),
        ("GB", "must be bytes"),
        ("", "must be bytes"),
        ("1e9", "must be bytes"),
        ("-5GB", "must be bytes"),
        ("1.2.3GB", "must be bytes"),
        ("\u0665GB", "must be bytes"),
        ("5GB\n5", "must be bytes"),
        ("nan", "must be bytes"),
        ("9" * 5000, "must be bytes"),
        (True, "must be bytes"),
        (-1, "must be bytes"),
        (0, "above 0"),
        ("0GB", "above 0"),
        ("0.5B", "a whole number of bytes"),
        ("1.5", "a whole number of bytes"),
        ("0.0001KB", "a whole number of bytes"),
    ],
)
def test_nonsense_is_refused_with_the_key(value: Any, words: str) -> None:
    with pytest.raises(UserError, match=f"max_shard_size={str(value)[:10]}.* is not possible: .*{words}"):
        parse_size(value)
