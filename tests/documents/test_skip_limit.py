"""Refusals of too much that was skipped: a few reasons, each with its place whole, and the fix that fits."""

import pytest

from dsv3.documents.skip_limit import Reason, Skipped, require_few_skipped
from dsv3.errors import UserError

PLACE = f"/{'deep/' * 60}x.jsonl: line 3"


def refusal(skipped: Skipped) -> str:
    with pytest.raises(UserError) as caught:
        require_few_skipped(skipped, 9, 0.01, "task.input=/data", field="text")
    return str(caught.value)


def test_the_most_frequent_reasons_are_named_with_their_whole_places() -> None:
    skipped = Skipped(documents=100)
    reasons = (Reason.NO_FIELD, Reason.NO_JSON, Reason.NUL, Reason.NOT_UTF8, Reason.NO_TEXT)
    for count, reason in enumerate(reasons, 1):
        skipped.add(reason, PLACE, count)
    told = refusal(skipped)
    assert told.count(PLACE) == 3
    assert "5 documents: the field holds no text" in told
    assert "and 2 more reasons)" in told
    assert " ... " not in told


@pytest.mark.parametrize(("missing", "fix"), [(5, "Name the field"), (2, "Mend or remove them")])
def test_the_field_is_to_be_named_where_most_lack_it(missing: int, fix: str) -> None:
    skipped = Skipped(documents=9)
    skipped.add(Reason.NO_FIELD, PLACE, missing)
    skipped.add(Reason.NO_JSON, PLACE, 3)
    assert refusal(skipped).splitlines()[1].startswith(fix)
