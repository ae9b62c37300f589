"""convert.py with small files on a slow disk, to be stopped half-way: python -m tests.convert.killed."""

import sys
import time

import convert
from dsv3.convert import dcp_target
from dsv3.convert.output_file import Sink
from tests.convert.command import main

SECONDS = 0.02
"""What a file takes until it is on the disk."""
_finish = Sink.finish


def slow_finish(self: Sink) -> str:
    """As on a disk that takes its time; tells of it."""
    time.sleep(SECONDS)
    print(f"finishing {self.path.name}", file=sys.stderr, flush=True)
    return _finish(self)


if __name__ == "__main__":
    Sink.finish = slow_finish  # type: ignore[method-assign]
    dcp_target._SMALLEST = 4096
    sys.exit(convert.application.run(main, sys.argv[1:]))
