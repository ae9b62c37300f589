"""The result of a command, however it was run."""

from dataclasses import dataclass


@dataclass
class Outcome:
    """An exit code and what was printed."""

    code: int
    out: str
    err: str


def succeeded(outcome: Outcome) -> Outcome:
    """Assert that the command ended with 0; return its outcome."""
    assert outcome.code == 0, outcome.err
    return outcome


def refused(outcome: Outcome, *words: str, code: int = 2) -> None:
    """Assert the exit code, one or two lines on stderr that hold all of `words`, and nothing else printed."""
    assert outcome.code == code, outcome.err
    assert 1 <= len(outcome.err.strip().splitlines()) <= 2, outcome.err
    assert "Traceback" not in outcome.err
    assert outcome.out == ""
    for word in words:
        assert word in outcome.err, outcome.err
