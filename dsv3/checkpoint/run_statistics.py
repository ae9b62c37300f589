"""What a run remembers of its own past, to tell bad numbers from good ones; part of every checkpoint.

It is JSON in state.json, so a resume has it on any layout. Every number is a finite Python float that has
been computed on all ranks alike, and JSON brings floats back bit for bit.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from dsv3.config.limits import ITEMS


@dataclass
class RunStatistics:
    """The running statistics after a step; training/accidents.py says what they are for."""

    norms: list[float] = field(default_factory=list)
    """Gradient norms of the last good steps, the oldest first."""
    losses: list[float] = field(default_factory=list)
    """Losses of the last good steps in nats, the oldest first."""
    lowest: float | None = None
    """The lowest mean of the loss over a whole window so far, in nats."""
    above_since: int | None = None
    """The step since which the mean has been above the lowest by more than allowed; None: it is not."""
    alarm: bool = False
    """The mean has been above it for so long that it is an alarm."""
    held_out_lost: bool = False
    """The last held-out loss was not finite."""
    skipped: int = 0
    """Steps skipped since step 0."""
    recent: list[int] = field(default_factory=list)
    """The last skipped steps, ascending, as far back as they are counted."""
    rewinds: int = 0
    """How often the run has gone back."""

    @property
    def in_doubt(self) -> bool:
        """Return whether a checkpoint of this moment is no good one: the loss is above its past."""
        return self.above_since is not None or self.alarm or self.held_out_lost

    def to_json(self) -> dict[str, Any]:
        """Return the values as JSON has them."""
        return asdict(self)

    @classmethod
    def from_json(cls, stored: Any) -> "RunStatistics":
        """Return the stored values; {} is those of a run's begin, and of a checkpoint of older code.

        Raises:
            ValueError: something else stands there.
        """
        if not isinstance(stored, Mapping):
            raise ValueError("its statistics are no mapping")
        known = {each.name: each for each in fields(cls)}
        if any(name not in known for name in stored):
            raise ValueError("its statistics have unknown names")
        found = cls(**stored)
        lists = (found.norms, found.losses, found.recent)
        right = all(isinstance(values, list) and len(values) <= ITEMS for values in lists)
        right = right and all(map(_is_number, [*found.norms, *found.losses]))
        right = right and all(map(_is_count, [*found.recent, found.skipped, found.rewinds]))
        right = right and (found.lowest is None or _is_number(found.lowest))
        right = right and (found.above_since is None or _is_count(found.above_since))
        if not right or not all(type(flag) is bool for flag in (found.alarm, found.held_out_lost)):
            raise ValueError("its statistics hold something else than numbers")
        return found


def _is_number(value: object) -> bool:
    return isinstance(value, float) and math.isfinite(value)


def _is_count(value: object) -> bool:
    return type(value) is int and value >= 0
