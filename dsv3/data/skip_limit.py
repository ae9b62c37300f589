"""What was skipped while documents were read: told by reason, and refused beyond data.max_skipped."""

import math

from dsv3.data.document_files import Skipped
from dsv3.errors import UserError
from dsv3.metrics.progress import amount


def skipped_lines(skipped: Skipped) -> list[str]:
    """Return a line per reason, with the first place that has it."""
    return [
        f"skipped {amount(count, noun)}: {reason}, first {skipped.first.get(reason, '?')}"
        for noun, counts in (("documents", skipped.counts), ("files", skipped.files))
        for reason, count in counts.items()
    ]


def require_few_skipped(skipped: Skipped, files: int, limit: float, title: str) -> None:
    """Raise UserError where more than a share of the documents, or of the files, was skipped.

    Args:
        files: all files, of which `skipped.files` cannot be read.
        limit: data.max_skipped, the largest share.
        title: what was read, as in `data.path=FOLDER`.
    """
    bad, unread = skipped.num_skipped, sum(skipped.files.values())
    shares = [
        (bad / max(1, bad + skipped.documents), f"{bad:,} of {amount(bad + skipped.documents, 'documents')}"),
        (unread / max(1, files), f"{unread:,} of {amount(files, 'files')}"),
    ]
    share, told = max(shares)
    if share <= limit:
        return
    reasons = ", ".join(line.removeprefix("skipped ") for line in skipped_lines(skipped))
    enough = math.ceil(100 * share) / 100
    raise UserError(
        f"{title}: {told} cannot be read, more than data.max_skipped={limit:g} allows ({reasons})\n"
        f"Mend or remove them, or read the others alone: data.max_skipped={enough:g}"
    )
