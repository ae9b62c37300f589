"""A mutation: a rule of the project, and the edit that breaks it."""

from dataclasses import dataclass
from pathlib import Path

from benchmarks.code_patterns import edit


@dataclass
class Mutation:
    """One rule, and the edit that breaks it."""

    rule: str
    where: str
    """MODULE:FUNCTION, MODULE:CLASS or MODULE."""
    old: str
    """The pattern that has to fit in one place; see code_patterns.py."""
    new: str
    tests: str

    @property
    def file(self) -> Path:
        """The module's file, relative to the project."""
        return Path(self.where.partition(":")[0].replace(".", "/") + ".py")

    def apply(self, source: str) -> str:
        """Return the module's `source` with the rule broken."""
        return edit(source, self.where.partition(":")[2], self.old, self.new)
