"""Sizes of files as people write them."""

import re
from fractions import Fraction

from dsv3.runtime.errors import InvalidValue, nearest

UNITS = {"B": 1} | {
    f"{prefix}{'i' * binary}B": (1024 if binary else 1000) ** power
    for power, prefix in enumerate("KMGT", start=1)
    for binary in (False, True)
}
"""Bytes by unit: 1 GB is 1000^3 and 1 GiB is 1024^3, as on the hub."""

_SIZE = re.compile(r"\s*([0-9]{1,20}(?:\.[0-9]{1,20})?)\s*([A-Za-z]*)\s*", re.ASCII)


def parse_size(value: str | int, key: str = "max_shard_size") -> int:
    """Bytes of `5GB`, `2.5 GiB` or a plain number; InvalidValue for `key` where it is no size above 0.

    huggingface_hub keeps its own to itself, and that one knows no GiB and no plain numbers.
    """
    found = _SIZE.fullmatch(str(value))
    factors = {unit.lower(): factor for unit, factor in UNITS.items()} | {"": 1}
    if found is None or found[2].lower() not in factors:
        hint = _hint(found[1], found[2]) if found else ""
        raise InvalidValue(key, value, f"must be bytes, or a number with one of {', '.join(UNITS)}.{hint}")
    size = Fraction(found[1]) * factors[found[2].lower()]
    if size < 1 or size.denominator > 1:
        raise InvalidValue(key, value, "must be a whole number of bytes above 0")
    return int(size)


def _hint(number: str, unit: str) -> str:
    close = nearest(unit, UNITS) or nearest(f"{unit.upper()}B", UNITS)
    return close.replace("'", f"'{number}", 1)
