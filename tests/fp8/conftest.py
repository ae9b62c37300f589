"""One thread for the whole package."""

from tests.threads import one_thread

__all__ = ["one_thread"]
