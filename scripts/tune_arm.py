"""Tune attention on boards: `python scripts/tune_arm.py --tracker HOST:PORT --key KEY --target cortex-a72`."""

import sys

from rpe_tvm.tune.arm_cli import main

if __name__ == "__main__":
    sys.exit(main())
