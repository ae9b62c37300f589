"""The seal of an entry of the cache: sizes and digests of its files, compared whenever a run starts with it.

An entry is sealed when it is published and never changes then. A file that is missing, cut off or altered
makes the entry one to be built again, and so does damage to the seal itself. Up to AT_START bytes are
compared at start, the smallest files first: the index, the tokenizer, the scan and the offsets always. Of a
larger entry the rest is compared while the run goes on (background_check.py). What the thread finds ends the
run and marks the entry, so that the next start builds it again.
"""

from collections.abc import Collection
from pathlib import Path

from dsv3.tokens.background_check import BACKGROUND, DigestedFile, check_at_start
from dsv3.tokens.file_digests import FileEntry, decode_entries, encode_entries
from dsv3.untrusted_files import MissingFile, read_json, read_text

SEAL_FILE, DAMAGE_FILE = "seal.json", "damaged.txt"

AT_START = 4 << 30
"""Bytes of an entry that are compared at start: a second from memory, a few from a disk of the node."""


class BrokenSeal(Exception):
    """An entry has no seal, or is not what its seal says; the text is empty where there is no entry."""


def write_seal(directory: Path, apart: Collection[str] = ()) -> None:
    """Note the size and digest of every file of a finished entry, but for those named `apart`."""
    (directory / DAMAGE_FILE).unlink(missing_ok=True)
    files = (path for path in directory.rglob("*") if path.is_file())
    named = {path.relative_to(directory).as_posix(): path for path in files}
    entries = {name: FileEntry.of(path) for name, path in named.items() if name not in (SEAL_FILE, *apart)}
    (directory / SEAL_FILE).write_text(encode_entries(entries), "utf-8")


def check_seal(directory: Path) -> None:
    """Compare an entry with its seal.

    Raises:
        BrokenSeal: it is not there, has no seal, or a file is not what the seal says.
    """
    if not directory.exists():
        raise BrokenSeal
    entries = _read_seal(directory)
    for name, entry in entries.items():
        try:
            size = (directory / name).stat().st_size
        except OSError as error:
            raise BrokenSeal(f"{directory / name} cannot be read: {error.strerror}") from error
        if size != entry.size:
            raise BrokenSeal(f"{directory / name} has {size:,} bytes, its seal tells of {entry.size:,}")

    def mark(wrong: str) -> None:
        try:
            (directory / DAMAGE_FILE).write_text(wrong, "utf-8", "backslashreplace")
        except OSError:  # a cache that cannot be written is compared again at the next start
            return

    remedy = "it is damaged, the next start makes it anew"
    files = [
        DigestedFile(str(directory / name), entry.digest, SEAL_FILE, remedy, mark)
        for name, entry in entries.items()
    ]
    wrong, left = check_at_start(files, AT_START, f"verifying the cache's {directory.name}")
    if wrong:
        raise BrokenSeal(wrong[0].removesuffix(f": {remedy}"))
    BACKGROUND.add(left)


def _read_seal(directory: Path) -> dict[str, FileEntry]:
    """Return the files of an entry by name; BrokenSeal where the entry is marked, or has no sound seal."""
    try:
        if (directory / DAMAGE_FILE).exists():
            raise BrokenSeal(read_text(directory / DAMAGE_FILE, errors="replace")[:300])
        return decode_entries(read_json(directory / SEAL_FILE, "listing"))
    except MissingFile:
        raise BrokenSeal(f"it has no {SEAL_FILE}, as those of earlier versions") from None
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        reason = str(error) or type(error).__name__
        raise BrokenSeal(f"{directory / SEAL_FILE} is damaged: {reason[:200]}") from None
