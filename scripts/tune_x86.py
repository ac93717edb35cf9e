"""Tune attention for the CPU of this machine: `python scripts/tune_x86.py --preset quick`."""

import sys

from rpe_tvm.tune.cli import main

if __name__ == "__main__":
    sys.exit(main())
