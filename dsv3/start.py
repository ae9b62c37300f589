"""Start train.py and convert.py: the imports, which take a second, and then the program.

This file imports nothing of weight, so that a Ctrl-C finds it listening. A KeyboardInterrupt in the middle of
an import could surface anywhere, as a traceback or as a module that is half there: until the program itself
listens, a Ctrl-C ends the process at once.
"""

import os
import signal
import sys


def train() -> int:
    """Run train.py's command line; return the exit code."""
    return _start("train")


def convert() -> int:
    """Run convert.py's command line; return the exit code."""
    return _start("convert")


def _start(program: str) -> int:
    ignored = signal.getsignal(signal.SIGINT) is signal.SIG_IGN  # `nohup`, or a script's `python train.py &`
    if not ignored:
        signal.signal(signal.SIGINT, _leave)
    if signal.getsignal(signal.SIGTERM) is not signal.SIG_IGN:
        signal.signal(signal.SIGTERM, _leave)
    from dsv3.distributed.garbage import collect_rarely
    from dsv3.errors import KILLED
    from dsv3.metrics.progress import phase

    collect_rarely()
    with phase("importing dsv3"):
        from dsv3 import programs
        from dsv3.distributed.streams import outlive_readers

    outlive_readers()
    application = {"train": programs.TRAIN, "convert": programs.CONVERT}[program]
    try:
        if not ignored:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        return application.run(sys.argv[1:])
    except KeyboardInterrupt:  # before the application began to listen, or after it had ended
        return KILLED


def _leave(number: int, frame: object) -> None:
    os._exit(130)  # errors.KILLED, which is not imported yet


if __name__ == "__main__":  # python -m dsv3.start, which launch=slurm starts where there is no train.py
    sys.exit(train())
