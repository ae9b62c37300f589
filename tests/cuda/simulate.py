"""Run a Python program on a simulated GPU.

    python -m tests.cuda.simulate train.py precision=bf16 train.steps=2 logger=none

`SIMULATED_GPUS` (8) and `SIMULATED_CAPABILITY` (9.0) describe the machine. At the end it prints to stderr
where the host waited, which attention kernels were chosen, and the peak memory. tests/cuda/device.py says
what is simulated.
"""

import atexit
import runpy
import sys
from pathlib import Path

from dsv3.distributed.garbage import collect_rarely
from tests.cuda.library import load_library


def report() -> None:
    """Print what the ledger has counted."""
    from tests.cuda.ledger import LEDGER, MEMORY

    for title, counts in (("host waits", LEDGER.waits), ("attention kernels", LEDGER.kernels)):
        print(f"simulated GPU: {counts.total()} {title}", file=sys.stderr)
        for name, count in counts.most_common(40):
            print(f"{count:8d} {name}", file=sys.stderr)
    launches, peak = LEDGER.launches.total(), MEMORY.peak / 2**20
    print(f"simulated GPU: {launches} launches, peak memory {peak:.1f} MiB", file=sys.stderr)


def main() -> None:
    """Run the program that the command line names."""
    if not Path(sys.argv[1]).is_file():  # as Python says it, before torch is there
        raise SystemExit(f"can't open file {sys.argv[1]!r}")
    collect_rarely()
    load_library()
    from tests.cuda.runtime import install

    install()
    atexit.register(report)
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
