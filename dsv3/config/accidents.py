"""Schema of the node `train.accidents`: what a run does about bad numbers (docs/reliability.md)."""

import math
from dataclasses import asdict, dataclass, field
from enum import Enum

from dsv3.errors import require, require_positive


class OnAlarm(Enum):
    """Answer to a loss that stays above its past."""

    tell = "tell"
    rewind = "rewind"


@dataclass
class AccidentsConfig:
    """Steps with bad numbers, and a loss that stays above its past."""

    skip: bool = True
    """Skip steps whose loss or gradient is not finite, and spikes; false: the former end the run."""
    spike_factor: float = field(default=10.0, metadata={"unbounded": True})
    """A gradient norm above so many times the median of the last good ones is a spike; inf: none is."""
    spike_window: int = 100
    """Good steps whose gradient norms the median is of; until there are so many no norm is a spike."""
    most: int = 10
    """Skipped steps among the last `within` with which a run goes on; one more ends it."""
    within: int = 100
    """Steps in which skipped steps are counted."""
    alarm_rise: float = field(default=1.0, metadata={"unbounded": True})
    """Nats by which the mean loss has to exceed the lowest one so far for an alarm; inf: there is none."""
    alarm_window: int = 20
    """Steps of the mean loss."""
    alarm_steps: int = 20
    """Steps in a row on which the mean loss exceeds the lowest one by so much, for an alarm."""
    on_alarm: OnAlarm = OnAlarm.tell
    """tell, or rewind: go back to the last good checkpoint, and on with the data behind the bad stretch."""
    max_rewinds: int = 3
    """Rewinds of a run; an alarm behind the last of them ends it."""

    def validate(self) -> None:
        require_positive(self, "spike_window", "within", "alarm_rise", "alarm_window", "alarm_steps")
        require(self.spike_factor > 1, "spike_factor", self.spike_factor, "must be above 1, or inf")
        require(self.most >= 0, "most", self.most, "must be 0 or more")
        require(self.most < self.within, "most", self.most, f"must be below within={self.within}")
        require(self.max_rewinds >= 0, "max_rewinds", self.max_rewinds, "must be 0 or more")


_OFF = AccidentsConfig(skip=False, spike_factor=math.inf, alarm_rise=math.inf)

OLDER = asdict(_OFF) | {"on_alarm": _OFF.on_alarm.value}
"""The values with which a run does what those of older code did, whose configs lack the node."""
