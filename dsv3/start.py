"""Start train.py and convert.py: the imports, which take a second, and then the program.

This file imports nothing of weight, so that a signal finds it listening. A KeyboardInterrupt in the middle of
an import could surface anywhere, as a traceback or as a module that is half there: until the program itself
listens, a stop ends the process at once.
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
    # Blocked, SIGUSR1 waits in the kernel until training can save, here and in every child of this process.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
    stops = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)  # STOP_SIGNALS of signals.py
    # `nohup`, or a script's `python train.py &`, has some ignored, and they stay so.
    heeded = [number for number in stops if signal.getsignal(number) is not signal.SIG_IGN]
    for number in heeded:
        signal.signal(number, _leave)
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
        code = application.run(sys.argv[1:])
    except KeyboardInterrupt:  # of a sweep that has just ended
        code = KILLED
    for number in heeded:  # what is left to end has ended: its own code holds
        signal.signal(number, lambda *_: os._exit(code))
    return code


def _leave(number: int, frame: object) -> None:
    os._exit(130)  # errors.KILLED, which is not imported yet


if __name__ == "__main__":  # python -m dsv3.start, which launch=slurm starts where there is no train.py
    sys.exit(train())
