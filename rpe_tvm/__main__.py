"""``python -m rpe_tvm``."""

import sys

from rpe_tvm.cli import main

sys.exit(main())
