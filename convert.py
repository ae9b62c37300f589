"""Move models between formats and places: `python convert.py --help` explains how."""

import sys

from dsv3.start import convert

if __name__ == "__main__":
    sys.exit(convert())
