"""What scheduled functions still need before they are compiled, because TVM's schedules cannot say it."""

from __future__ import annotations

import tvm

from rpe_tvm.build.shared_arrays import share_arrays
from rpe_tvm.build.tile_ends import end_tiles


def finish(function: tvm.tirx.PrimFunc) -> tvm.tirx.PrimFunc:
    """Return a scheduled function as it is compiled, by operators and by the tuner alike."""
    return end_tiles(share_arrays(function))
