"""Sizes and digests of a checkpoint's files, in manifest.json beside them, and checks against them.

The manifest is written last, so that a directory that has one was finished. It carries a digest of its own
list (tokens/file_digests.py), so that damage to itself is not blamed on a file.
"""

import heapq
import shlex
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from dsv3.checkpoint.directory import MANIFEST_FILE, STATE_FILE, complete_steps, promises_manifest, write_text
from dsv3.config.registry import command
from dsv3.errors import UserError
from dsv3.metrics.progress import phase
from dsv3.tokens.file_digests import FileEntry, decode_entries, digest, encode_entries
from dsv3.untrusted_files import read_json

TENSOR_FILES = (".distcp", ".safetensors")
"""Endings of the files that hold weights."""


def write_manifest(directory: Path, entries: dict[str, FileEntry]) -> None:
    """Write the entries, by paths relative to `directory`, as manifest.json: complete or not at all."""
    write_text(directory / MANIFEST_FILE, encode_entries(entries))


def read_manifest(directory: Path) -> dict[str, FileEntry] | None:
    """Return the entries by relative path; None for a checkpoint older than manifests or of another tool.

    UserError for a damaged one, and where state.json says that there was one.
    """
    path = directory / MANIFEST_FILE
    try:
        return decode_entries(read_json(path, "listing"))
    except FileNotFoundError:
        if promises_manifest(directory):
            raise UserError(f"{path} is missing: {STATE_FILE} says that it was written") from None
        return None
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        reason = getattr(error, "reason", "") or str(error) or type(error).__name__
        raise UserError(f"{path} cannot be read, it may be damaged: {reason}") from None


def verify(directory: Path, files: Iterable[str] | None = None) -> bool:
    """Compare `files` of a directory (None: all) with its manifest, all the sizes first.

    Return False where there is no manifest to compare with; names that the manifest does not list are
    skipped. UserError that names the first file that is missing, truncated or altered.
    """
    entries = read_manifest(directory)
    if entries is None:
        return False
    chosen = entries if files is None else {name: entries[name] for name in files if name in entries}
    check_sizes(directory, chosen)
    check_digests(directory, chosen)
    return True


def verify_description(directory: Path) -> bool:
    """Compare all sizes, and the content of all files but the tensors: a quick check before workers start."""
    entries = read_manifest(directory) or {}
    check_sizes(directory, entries)
    return verify(directory, [name for name in entries if not name.endswith(TENSOR_FILES)])


def check_sizes(directory: Path, entries: dict[str, FileEntry]) -> None:
    """Raise UserError for the first file that is missing or of another size."""
    for name, entry in entries.items():
        path = directory / name
        if not path.is_file():
            raise UserError(f"{path} is missing: {MANIFEST_FILE} lists it with {entry.size:,} bytes")
        size = path.stat().st_size
        if size != entry.size:
            what = "truncated" if size < entry.size else "altered"
            raise UserError(f"{path} is {what}: it has {size:,} bytes, {MANIFEST_FILE} says {entry.size:,}")


def check_digests(directory: Path, entries: dict[str, FileEntry]) -> None:
    """Raise UserError for the first file whose content has not the digest that the manifest says."""
    with phase(f"verifying {directory}", sum(entry.size for entry in entries.values())) as work:
        for name, entry in entries.items():
            path = directory / name
            try:
                found = digest(path, work.advance)
            except OSError as error:
                raise UserError(f"{path} cannot be read: {error.strerror or error}") from None
            if found != entry.digest:
                raise UserError(
                    f"{path} is altered: its XXH3-128 is {found}, {MANIFEST_FILE} says {entry.digest}"
                )


if TYPE_CHECKING:  # a check of the description alone needs no torch
    from dsv3.distributed.process_group import RankContext


def verify_together(directory: Path, ranks: "RankContext") -> None:
    """Compare a checkpoint with its manifest, if it has one: all sizes, and a share of the content.

    The ranks call it together. UserError on all of them, with the damage that the first rank found.
    """
    from dsv3.checkpoint.agreement import together

    def verify_share() -> None:
        entries = read_manifest(directory) or {}
        if ranks.local_rank == 0:  # a node may see another disk
            check_sizes(directory, entries)
        check_digests(directory, {name: entries[name] for name in shares(entries, ranks.world)[ranks.rank]})

    together(ranks, verify_share, waiting="waiting for the other ranks to verify theirs")


def shares(entries: dict[str, FileEntry], world: int) -> list[list[str]]:
    """Return the files that each rank reads, about as many bytes per rank.

    The largest files go first, each to the rank with least.
    """
    result: list[list[str]] = [[] for _ in range(world)]
    loads = [(0, rank) for rank in range(world)]
    for name in sorted(entries, key=lambda name: (-entries[name].size, name)):
        load, rank = loads[0]
        heapq.heapreplace(loads, (load + entries[name].size, rank))
        result[rank].append(name)
    return result


def check_newest(newest: Path) -> None:
    """Compare the description of a run's newest checkpoint, before workers start; see `with_way_out`."""
    try:
        verify_description(newest)
        _require_metadata(newest)
    except UserError as error:
        raise with_way_out(error, newest) from None


def _require_metadata(step: Path) -> None:
    """Raise UserError for a checkpoint without the file that says what its tensors are.

    Its manifest, which may be gone as well, is compared by others.
    """
    if not (step / ".metadata").is_file():
        raise UserError(f"{step} has lost its .metadata, or is no checkpoint")


def with_way_out(error: UserError, newest: Path) -> UserError:
    """Return `error`, found in a run's newest checkpoint, with the command that goes on from an older one.

    The user decides whether to move the damaged ones away: perhaps the disk or the copy can be repaired.
    """
    run_dir = newest.parent.parent
    aside, older = [newest], None
    for step in reversed(complete_steps(run_dir)[:-1]):
        try:
            _require_metadata(step)
            check_sizes(step, read_manifest(step) or {})
        except UserError:
            aside.append(step)
        else:
            older = step
            break
    where = f"from {older.name}" if older is not None else "from step 0, as no older checkpoint is whole,"
    damaged = run_dir / "damaged"
    move = f"mkdir -p {shlex.quote(str(damaged))} && {shlex.join(['mv', *map(str, aside), f'{damaged}/'])}"
    resume = shlex.join([*command("train"), f"resume={run_dir}"])
    return UserError(f"{error}\nto go on {where} instead: {move} && {resume}")
