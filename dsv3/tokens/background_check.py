"""Compare files with their digests: some bytes at start, and the rest while the run goes on.

What is compared at start is bounded, so that a start is short whatever the data. A thread compares the rest
at a bounded rate. A file that it finds damaged ends the run: the next read of token ids, of whatever file,
raises a UserError. Rows of that file may have been trained on since the start, and the message says so.
"""

import random
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import xxhash

from dsv3.errors import UserError
from dsv3.metrics.progress import phase, tell
from dsv3.tokens.file_digests import digest
from dsv3.untrusted_files import BadFile, open_file

RATE = 32 << 20
"""Bytes per second that the thread of a process reads."""

THREADS = 8
"""Files that are compared at once at start."""

_BLOCK = 4 << 20

_WORTH_THREADS = 64 << 20
"""Bytes from which threads are worth their start."""


@dataclass(frozen=True)
class DigestedFile:
    """A file and the XXH3-128 that it should have.

    Attributes:
        digest: 32 hexadecimal digits, of either case.
        told_by: what says so, for messages.
        remedy: what to do where it is damaged, for messages.
        on_damage: is called with the message once the thread has found damage.
    """

    path: str
    digest: str
    told_by: str
    remedy: str
    on_damage: Callable[[str], None] | None = None

    def damage(self, found: str) -> str | None:
        """Return what is wrong with a file of the digest `found`; None where nothing is."""
        if found == self.digest.lower():
            return None
        return f"{self.path} has the digest {found}, {self.told_by} tells of {self.digest}: {self.remedy}"


def check_at_start(
    files: Iterable[DigestedFile], nbytes: int, title: str
) -> tuple[list[str], list[DigestedFile]]:
    """Compare files with their digests, the smallest first, until `nbytes` have been read.

    Return what is wrong with those that are damaged or cannot be read, and the files that are left.
    """
    sized, wrong, read = [], [], 0
    for file in files:
        try:
            sized.append((Path(file.path).stat().st_size, file))
        except OSError as error:
            wrong.append(f"{file.path} cannot be read: {error.strerror}")
    sized.sort(key=lambda each: each[0])
    chosen = []
    for size, file in sized:
        read += size
        if read > nbytes:
            break
        chosen.append((size, file))
    total = sum(size for size, _ in chosen)

    def compare(entry: tuple[int, DigestedFile]) -> str | None:
        try:
            return entry[1].damage(digest(Path(entry[1].path), work.advance))
        except (OSError, BadFile) as error:
            return f"{entry[1].path} cannot be read: {getattr(error, 'strerror', None) or error}"

    with phase(title, total, each_node=True) as work:
        if total < _WORTH_THREADS:
            results = list(map(compare, chosen))
        else:
            with ThreadPoolExecutor(THREADS) as pool:
                results = list(pool.map(compare, chosen[::-1]))  # the largest first
    return wrong + [told for told in results if told], [file for _, file in sized[len(chosen) :]]


class BackgroundCheck:
    """The files that a process still has to compare, and the thread that does.

    Attributes:
        damage: what is wrong with a file that the thread has found damaged; empty while there is none.
    """

    def __init__(self) -> None:
        self.damage = ""
        self._waiting: list[DigestedFile] = []
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def reset(self) -> None:
        """Forget all files: another run begins, with data of its own."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        self.damage, self._waiting, self._thread, self._stop = "", [], None, threading.Event()

    def add(self, files: Sequence[DigestedFile]) -> None:
        """Add files, which are compared once `start` is called."""
        self._waiting += files

    def start(self) -> None:
        """Compare the files that wait, in a thread; the order is another one at every start."""
        if not self._waiting or self._thread is not None:
            return
        random.SystemRandom().shuffle(self._waiting)  # runs that end early compare other files each time
        self._thread = threading.Thread(target=self._run, name="digests of the data", daemon=True)
        self._thread.start()

    def require_sound(self) -> None:
        """Raise UserError once the thread has found damage."""
        if self.damage:
            raise UserError(self.damage)

    def wait(self) -> None:
        """Wait until the thread is done."""
        if self._thread is not None:
            self._thread.join()

    def _run(self) -> None:
        while self._waiting and not self._stop.is_set():
            file = self._waiting.pop()
            try:
                found = self._digest(file.path)
            except (OSError, BadFile):  # a file that is gone is told of when it is read
                continue
            wrong = found and file.damage(found)
            if wrong:
                self.damage = f"{wrong}; rows of it may have been trained on since this start"
                tell(self.damage)
                if file.on_damage is not None:
                    file.on_damage(wrong)
                return

    def _digest(self, path: str) -> str:
        """Return the digest of a file, read at RATE; empty where the check is to stop."""
        state, due = xxhash.xxh3_128(), time.monotonic()
        with open_file(path) as content:
            while block := content.read(_BLOCK):
                state.update(block)
                due += len(block) / RATE
                if self._stop.wait(max(0.0, due - time.monotonic())):
                    return ""
        return state.hexdigest()


BACKGROUND = BackgroundCheck()
"""That of this process: FileArray reads nothing more once it has found damage."""
