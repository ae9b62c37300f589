"""Errors that a command reports in its own words, its exit codes, and the suggestions in its messages.

cli/application.py prints an error and returns its exit code.
"""

import difflib
import errno
import os
import re
import shutil
from collections.abc import Iterable
from reprlib import Repr

DONE, FAILED, MISTAKE, STOPPED, KILLED = 0, 1, 2, 75, 130
"""Exit codes: done; the run failed (RunFailed, and anything unforeseen); the user's mistake (UserError);
stopped by a signal after saving (distributed/signals.py); stopped at once, by a second signal."""


LONGEST_MESSAGE = 500
"""Characters of a message at most, besides the paths and commands that it names."""

_LONGEST_WORD, _LONGEST_PATH = 100, 4096


class UserError(Exception):
    """A mistake that the user can fix: the commands print one or two lines and exit with code 2.

    The text is as short as LONGEST_MESSAGE says, whatever a file or a library has put into it.
    """

    def __str__(self) -> str:
        return shortened(super().__str__())


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
        return shortened(f"{self.key}={shown} is not possible: {self.allowed}")


def shortened(text: str) -> str:
    """Return a message with the middle of what is too long left out, of words first and then of its lines.

    A word with a slash may be a path, or part of a command to type: it stays whole and does not count, up to
    _LONGEST_PATH characters. So a command that a message names is never cut.
    """
    if len(text) <= LONGEST_MESSAGE:
        return text
    words = re.split(r"(\s)", text)
    paths = 0
    for number, word in enumerate(words):
        if len(word) > (_LONGEST_PATH if "/" in word else _LONGEST_WORD):
            words[number] = f"{word[:60]}...{word[-20:]}"
        elif "/" in word:
            paths += len(word)
    text = "".join(words)
    lines = text.splitlines()
    excess = len(text) - paths - LONGEST_MESSAGE
    if excess > 0:
        longest = max(range(len(lines)), key=lambda number: len(lines[number]))
        line, middle = lines[longest], len(lines[longest]) // 2
        half = max(0, min(excess + 5, len(line) - 40)) // 2 + 1
        lines[longest] = f"{line[: middle - half]} ... {line[middle + half :]}"
    return "\n".join(lines)


class RunFailed(Exception):
    """The run itself failed (a nonfinite loss, a dead worker): one message, and exit code 1."""


class RunOver(RunFailed):
    """The run failed in a way that a restart would repeat (launch.max_restarts): too many accidents."""


_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}

_REFUSED = {errno.EROFS, errno.EACCES, errno.EPERM, errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTDIR}

_FAILING = {errno.EIO, errno.ESTALE, errno.EMFILE, errno.ENFILE, errno.ENOMEM}


def refused_by_system(error: BaseException) -> UserError | None:
    """Return the mistake behind an OSError of a file: a full, failing or read-only disk, an impossible path.

    None for any other error, such as a file that is missing: who opened it knows why it should be there.
    """
    if not isinstance(error, OSError) or isinstance(error, UserError):
        return None
    error = first_of_copy(error)
    name, code, reason = error.filename2 or error.filename, error.errno, error.strerror
    place = "a file" if name is None else os.fsdecode(name) if isinstance(name, bytes) else str(name)
    if code in _FULL:
        return UserError(f"{place} cannot be written ({reason}): make room, and repeat the command")
    if code in _REFUSED:
        return UserError(f"{place} cannot be read or written ({reason}): name another place, or mend it")
    if code in _FAILING:
        return UserError(f"{place} cannot be read or written: {reason}")
    return None


def first_of_copy(error: OSError) -> OSError:
    """Return the first error of those that shutil.copytree collects as texts; any other error as it is."""
    if not isinstance(error, shutil.Error) or not error.args or not isinstance(error.args[0], list):
        return error
    _, name, told = error.args[0][0]
    found = re.match(r"\[Errno (\d+)\] ([^:]*)", str(told))
    return OSError(int(found[1]), found[2], str(name)) if found else OSError(0, str(told)[:200], str(name))


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


def list_hint(path: str) -> str:
    """Return what to give instead of a list where one path is read; empty where `path` looks like none."""
    if not (path.startswith("[") and path.endswith("]") and "," in path):
        return ""
    return "; one path is read here: the folder of several, or data=mixture with a source for each"


def comma_separated(numbers: Iterable[int]) -> str:
    """Return `numbers` as a message lists them: `1, 2, 4`."""
    return ", ".join(map(str, numbers))


_SHORT = Repr()
_SHORT.maxstring = _SHORT.maxother = 120
_SHORT.maxlist = 8


def quoted(value: object) -> str:
    """Return a name or value out of a file for a message: short, quoted, unprintables escaped."""
    return _SHORT.repr(value)
