"""What was skipped while documents were read: told by reason, and refused beyond data.max_skipped."""

import math

from dsv3.data.document_files import Reason, Skipped
from dsv3.errors import UserError
from dsv3.metrics.progress import amount


def skipped_lines(skipped: Skipped) -> list[str]:
    """Return a line per reason, with the first place that has it."""
    return [
        f"skipped {amount(count, noun)}: {reason}, first {skipped.first.get(reason, '?')}"
        for noun, counts in (("documents", skipped.counts), ("files", skipped.files))
        for reason, count in counts.items()
    ]


EARLY = 10_000
"""Documents after which too many are refused before everything was read."""


def require_few_skipped(
    skipped: Skipped, files: int, limit: float, title: str, at_end: bool = True, field: str | None = None
) -> None:
    """Raise UserError where more than a share of the documents, or of the files, was skipped.

    Args:
        files: all files, of which `skipped.files` cannot be read.
        limit: data.max_skipped, the largest share.
        title: what was read, as in `data.path=FOLDER`.
        at_end: everything was read; else a few documents say nothing of the rest.
        field: data.field, to be named where it is missing.
    """
    bad, unread = skipped.num_skipped, sum(skipped.files.values())
    shares = [
        (bad / max(1, bad + skipped.documents), f"{bad:,} of {amount(bad + skipped.documents, 'documents')}"),
        (unread / max(1, files), f"{unread:,} of {amount(files, 'files')}"),
    ]
    share, told = max(shares)
    if share <= limit or not (at_end or bad + skipped.documents >= EARLY or unread > limit * files):
        return
    reasons = ", ".join(line.removeprefix("skipped ") for line in skipped_lines(skipped))
    enough = math.ceil(100 * share) / 100
    mend = "Mend or remove them"
    if field is not None and Reason.NO_FIELD in skipped.counts:
        mend = f"Name the field that holds the text (data.field={field} now)"
    others = f", or read the others alone: data.max_skipped={enough:g}" if share < 1 else ""
    raise UserError(
        f"{title}: {told} cannot be read, more than data.max_skipped={limit:g} allows ({reasons})\n"
        f"{mend}{others}"
    )
