"""Tune attention for an AMD GPU, of this machine or over RPC: `python scripts/tune_rocm.py --target gfx942`."""

import sys

from rpe_tvm.tune.gpu_cli import AMD, main

if __name__ == "__main__":
    sys.exit(main(vendor=AMD))
