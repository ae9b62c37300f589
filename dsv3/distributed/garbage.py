"""Python's search for garbage among objects that stay: how often it runs, and where it does not run at all.

Python frees an object with its last reference. Its collector is there for what refers to itself in a circle,
and looks through the young objects whenever 700 more have been made than freed, from time to time through
all. The imports of torch and a composed config are some 400,000 objects, of which hardly any ever is garbage.
"""

import gc
from collections.abc import Iterator
from contextlib import contextmanager

YOUNG_OBJECTS = 20_000
"""So many more objects made than freed set off a collection: a few MB of circles wait for it at most."""

YOUNG_COLLECTIONS = 20
"""So many collections of one generation come before one of the next."""


def collect_rarely() -> None:
    """Look for garbage once per 20,000 new objects in this process, instead of once per 700.

    Starting a run is importing and composing, a fifth of which was collecting: 0.5 s of 2.6 s of CPU time in
    every process. While a run trains, train.collect_garbage_every decides instead.

    The threads of a process share the thresholds, and a process that is spawned begins with Python's own:
    each calls this for itself, as early as it can.
    """
    gc.set_threshold(YOUNG_OBJECTS, YOUNG_COLLECTIONS, YOUNG_COLLECTIONS)


@contextmanager
def without_collections() -> Iterator[None]:
    """Look for no garbage inside: among millions of new objects that would take most of the time."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
