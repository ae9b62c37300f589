"""task=cache: list what lies in the cache of prepared data, and clear it; imports no torch."""

import json
import os
import sys
from datetime import datetime

from dsv3.config.task import OutputFormat
from dsv3.launch.job import Job
from dsv3.metrics.console import format_table
from dsv3.metrics.progress import amount, phase
from dsv3.tokens.cache import cache_root
from dsv3.tokens.cache_listing import CacheEntry, choose_entries, list_entries, remove_entry

_COLUMNS = ("entry", "size", "last use", "made from")


class CacheTask:
    """Prints the entries of the cache, the last used first; with `clear` it removes some of them.

    Args:
        clear: all, unused or the name of an entry; None removes nothing.
        unused_days: days without a use after which an entry counts as unused.
        format: of what is printed.
    """

    def __init__(self, clear: str | None, unused_days: float, format: OutputFormat) -> None:
        self.clear = clear
        self.unused_days = unused_days
        self.format = format

    def run(self, job: Job) -> None:
        """Print to stdout what is there, or what has been removed, and what stays because it is in use."""
        if os.environ.get("RANK", "0") != "0":
            return
        root = cache_root(job.config.data.cache_dir)
        entries, busy = list_entries(root), []
        if self.clear is not None:
            entries = choose_entries(entries, self.clear, self.unused_days)
            with phase(f"clearing {root}", len(entries), "entries") as work:
                for entry in entries:
                    if not remove_entry(entry):
                        busy.append(entry)
                    work.advance()
            entries = [entry for entry in entries if entry not in busy]
        if self.format is OutputFormat.json:
            found = {"folder": str(root), "cleared": self.clear is not None}
            lists = {"entries": entries, "in_use": busy}
            told = {name: [_to_json(entry) for entry in part] for name, part in lists.items()}
            print(json.dumps(found | told, indent=1))
            return
        if entries:
            rows = [_cells(entry) for entry in entries]
            print(format_table(rows, _COLUMNS, left_aligned=("entry", "last use", "made from")))
        total = amount(sum(entry.size for entry in entries), "bytes")
        count = f"{len(entries)} {'entry' if len(entries) == 1 else 'entries'}"
        print(f"{count}, {total}, {'removed from' if self.clear is not None else 'in'} {root}")
        for entry in busy:
            print(f"{entry.name} stays: a process uses it", file=sys.stderr)


def _cells(entry: CacheEntry) -> list[str]:
    used = datetime.fromtimestamp(entry.used).strftime("%Y-%m-%d %H:%M")
    made_from = entry.made_from or "-"
    return [entry.name, amount(entry.size, "bytes"), used, made_from if entry.finished else "unfinished"]


def _to_json(entry: CacheEntry) -> dict[str, object]:
    used = datetime.fromtimestamp(entry.used).astimezone().isoformat(timespec="seconds")
    return {
        "name": entry.name,
        "path": str(entry.path),
        "made_from": entry.made_from or None,
        "bytes": entry.size,
        "last_use": used,
        "finished": entry.finished,
    }
