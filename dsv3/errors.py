"""Errors that a command reports in its own words, its exit codes, and the suggestions in its messages.

cli/application.py prints an error and returns its exit code.
"""

import difflib
import re
from collections.abc import Iterable
from reprlib import Repr

DONE, FAILED, MISTAKE, STOPPED, KILLED = 0, 1, 2, 75, 130
"""Exit codes: done; the run failed (RunFailed, and anything unforeseen); the user's mistake (UserError);
stopped by SIGTERM or Ctrl-C after saving (distributed/signals.py); stopped at once, by a second signal."""


class UserError(Exception):
    """A mistake that the user can fix: the commands print one or two lines and exit with code 2."""


class InvalidValue(UserError):
    """A config value that is not possible: the message names the key, the value and what is allowed.

    `key` is relative to the dataclass that raises the error. The strict check of dsv3/config/strict.py puts
    the path of the node in front.
    """

    def __init__(self, key: str, value: object, allowed: str) -> None:
        super().__init__(key, value, allowed)
        self.key = key
        self.value = value
        self.allowed = allowed

    def __str__(self) -> str:
        value = "null" if self.value is None else str(self.value)
        shown = value if len(value) <= 120 else value[:117] + "..."
        return f"{self.key}={shown} is not possible: {self.allowed}"


class RunFailed(Exception):
    """The run itself failed (a nonfinite loss, a dead worker): one message, and exit code 1."""


class RunOver(RunFailed):
    """The run failed in a way that a restart would repeat (launch.max_restarts), such as too many accidents."""


def require(condition: bool, key: str, value: object, allowed: str) -> None:
    """Raise InvalidValue for `key` unless `condition` holds."""
    if not condition:
        raise InvalidValue(key, value, allowed)


def require_positive(config: object, *keys: str) -> None:
    """Raise InvalidValue for the first of the attributes `keys` that is not above 0; None passes."""
    for key in keys:
        value = getattr(config, key)
        require(value is None or value > 0, key, value, "must be above 0")


def did_you_mean(word: str, choices: Iterable[str], before: str = "") -> str:
    """Return ` Did you mean 'x'?` with the choice closest to a mistyped word, or an empty string.

    `before` is what is to be typed in front of the choice, such as the node of a key.
    """
    found = difflib.get_close_matches(word, list(choices), n=1, cutoff=0.5)
    return f" Did you mean '{before}{found[0]}'?" if found else ""


def closest_values(works: Iterable[int], value: int) -> list[int]:
    """Return the largest of `works` below `value` and the smallest above it, where they exist."""
    works = sorted(works)
    return [n for n in works if n < value][-1:] + [n for n in works if n > value][:1]


def closest_multiples(unit: int, value: int) -> list[int]:
    """Return the multiples of `unit` on both sides of `value`, without 0."""
    below = value // unit * unit
    return [n for n in (below, below + unit) if n > 0]


def repository_hint(path: str) -> str:
    """Return what to type instead of a repository of the hub, or a path behind hf:, that is no path here.

    Empty where a path looks like neither.
    """
    if path.startswith("hf:"):
        return "; hf: stands in checkpoint.load alone, leave it out here"
    if not re.fullmatch(r"[\w.-]*\w/\w[\w.-]*", path):
        return ""
    fetch = f"convert.py direction=download repo={path} assets=all output=DIR"
    return f"; a repository of the hub is fetched first, {fetch}, and DIR is then given"


def comma_separated(numbers: Iterable[int]) -> str:
    """Return `numbers` as a message lists them: `1, 2, 4`."""
    return ", ".join(map(str, numbers))


_SHORT = Repr()
_SHORT.maxstring = _SHORT.maxother = 120
_SHORT.maxlist = 8


def quoted(value: object) -> str:
    """Return a name or value out of a file for a message: short, quoted, unprintables escaped."""
    return _SHORT.repr(value)
