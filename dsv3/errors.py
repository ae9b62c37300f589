"""The user's mistakes: what they are called and how they are told.

The nearest values that would have worked, for the messages of broken laws.
"""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """A mistake the user can mend; the commands print its one or two lines and exit with code 2."""


class InvalidValue(UserError):
    """A config value that cannot be right: names the key, the value and what is allowed.

    `key` is relative to the dataclass that raises it; the strict check of dsv3/config/strict.py puts the
    path of the node in front.
    """

    def __init__(self, key: str, value: object, allowed: str) -> None:
        super().__init__(key, value, allowed)
        self.key = key
        self.value = value
        self.allowed = allowed

    def __str__(self) -> str:
        return f"{self.key}={_show(self.value)} is not possible: {self.allowed}"


class RunFailed(Exception):
    """The run itself went wrong (a non-finite loss, a dead worker): one message and exit code 1."""


def require(condition: bool, key: str, value: object, allowed: str) -> None:
    """Raise InvalidValue for `key` unless `condition` holds."""
    if not condition:
        raise InvalidValue(key, value, allowed)


def require_positive(config: object, *keys: str) -> None:
    """Raise InvalidValue for the first of the named attributes that is not above 0 (None passes)."""
    for key in keys:
        value = getattr(config, key)
        require(value is None or value > 0, key, value, "must be above 0")


def nearest(word: str, choices: Iterable[str]) -> str:
    """The choice closest to a mistyped word as ` Did you mean 'x'?`, or an empty string."""
    found = difflib.get_close_matches(word, list(choices), n=1, cutoff=0.5)
    return f" Did you mean '{found[0]}'?" if found else ""


def _show(value: object) -> str:
    text = "null" if value is None else str(value)
    return text if len(text) <= 120 else text[:117] + "..."


def nearest_of(works: Iterable[int], value: int) -> list[int]:
    """The largest of `works` below `value` and the smallest above it, where there are such."""
    works = sorted(works)
    return [n for n in works if n < value][-1:] + [n for n in works if n > value][:1]


def nearest_multiples(unit: int, value: int) -> list[int]:
    """The multiples of `unit` next to `value`, without 0."""
    below = value // unit * unit
    return [n for n in (below, below + unit) if n > 0]


def join(numbers: Iterable[int]) -> str:
    """`numbers` as they stand in a message."""
    return ", ".join(map(str, numbers))
