"""Let ranks wait for one another, and agree on flags, on the CPU: through the store, with no collective.

A collective that waits for the slow work of one rank, such as tokenizing or hashing, would be ended by its
own timeout, and NCCL's by NCCL's watchdog. A meeting has no timeout: it lasts as long as the work that is
waited for. The watchdog ends the run once no rank moves any more.
"""

import time
from typing import Any

from dsv3.distributed.heartbeat import HEARTBEAT

# A round's counter of 64 bits has three fields: the ranks that have arrived, those that have raised flag 1,
# and those with flag 2. Each counts to two million.
_FIELD, _FLAGS = 21, 2

# Seconds between two looks at the store: a rank that has waited for long looks rarely, as 2,048 others do.
_FIRST_LOOK, _LAST_LOOK = 0.0005, 0.5


class Meeting:
    """Rounds in which every rank arrives with flags and learns which of them any has raised.

    One rank's cost is three requests per round to the store, which is in the process of rank 0 or of
    torchrun's agent. All ranks call the same methods in the same order, each from one thread.

    Args:
        store: of the process group, by a connection in which nobody waits (torch_private.connect_to_store);
            meetings and threads may share it.
        name: tells apart the meetings of a process group.
    """

    def __init__(self, store: Any, world: int, name: str) -> None:
        self.store = store
        self.world = world
        self.name = name
        self.round = 0
        self._children = 0

    def apart(self) -> "Meeting":
        """Return another meeting of the same ranks, for another thread or another order of calls."""
        self._children += 1
        return Meeting(self.store, self.world, f"{self.name}.{self._children}")

    def meet(self, flag: bool = False) -> bool:
        """Wait until every rank is here; return True on all of them where any has raised `flag`."""
        self.arrive(int(flag))
        return bool(self.outcome())

    def arrive(self, flags: int) -> None:
        """Begin the next round, without waiting for the others, with `flags`: bits 1 and 2.

        Read the outcome of the round before first.
        """
        self.round += 1
        key = self._key(self.round)
        raised = [flags >> bit & 1 for bit in range(_FLAGS)]
        arrived = self.store.add(key, 1 + sum(each << _FIELD * (bit + 1) for bit, each in enumerate(raised)))
        if arrived % (1 << _FIELD) == self.world:
            counts = [(arrived >> _FIELD * (bit + 1)) % (1 << _FIELD) for bit in range(_FLAGS)]
            outcome = sum(1 << bit for bit, count in enumerate(counts) if count)
            self.store.set(f"{key} outcome", str(outcome))
            # Whoever has arrived here has read the outcome before.
            self.store.delete_key(f"{self._key(self.round - 1)} outcome")
            self.store.delete_key(key)

    def outcome(self) -> int:
        """Wait until every rank has arrived in this round; return the flags that any of them has raised.

        The wait is Python's, so that a signal is heard in it.
        """
        key, pause = f"{self._key(self.round)} outcome", _FIRST_LOOK
        while not self.store.check([key]):
            time.sleep(pause)
            pause = min(1.5 * pause, _LAST_LOOK)
        HEARTBEAT.beat()
        return int(self.store.get(key))

    def _key(self, number: int) -> str:
        return f"meeting {self.name}: {number}"
