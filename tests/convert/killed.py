"""convert.py with small files on a slow disk, to be stopped half-way: python -m tests.convert.killed."""

import sys
import time

from dsv3.convert import dcp_target
from dsv3.convert.output_file import HashingWriter
from dsv3.programs import CONVERT
from tests.harness.commands import run_here

SECONDS = 0.02
"""Seconds until a file is on the disk."""
_finish = HashingWriter.finish


def slow_finish(self: HashingWriter) -> str:
    """Finish as a slow disk does, and print the file's name."""
    time.sleep(SECONDS)
    sys.stderr.write(f"finishing {self.path.name}\n")  # in one piece: two threads write here
    sys.stderr.flush()
    return _finish(self)


if __name__ == "__main__":
    HashingWriter.finish = slow_finish  # type: ignore[method-assign]
    dcp_target._SMALLEST = 4096
    sys.exit(run_here(CONVERT, sys.argv[1:]))
