"""docs/reliability.md lists the limits that the code holds."""

from dsv3.untrusted_files import LIMITS
from tests.docs.limits_table import DOCUMENT, FILES, document


def test_the_documented_limits_are_those_of_the_code() -> None:
    assert set(FILES) == set(LIMITS)
    text = DOCUMENT.read_text()
    assert document(text) == text, "run: python -m tests.docs.limits_table"
