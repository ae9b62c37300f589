"""Train, evaluate, plan and sample: `python train.py --help` explains how."""

import sys

from dsv3.start import train

if __name__ == "__main__":
    sys.exit(train())
