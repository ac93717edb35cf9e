"""Tune attention for the NVIDIA GPU of this machine: `python scripts/tune_cuda.py`."""

import sys

from rpe_tvm.tune.gpu_cli import main

if __name__ == "__main__":
    sys.exit(main())
