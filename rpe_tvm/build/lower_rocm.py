"""From a config to the scheduled functions of attention on AMD GPUs."""

from __future__ import annotations

import tvm

from rpe_tvm.build import lower_gpu
from rpe_tvm.build.device_code import CALLS_ATTRIBUTE
from rpe_tvm.build.lower import Lowered
from rpe_tvm.errors import BuildError
from rpe_tvm.plan.gpu import GpuAttentionConfig
from rpe_tvm.schedules import rocm


def lower(config: GpuAttentionConfig) -> Lowered:
    """Return the functions of `lower_gpu.lower` that launch kernels, with local memory of a fixed size.

    Those that call them are host code, which a code object does not have: the caller keeps the sequence.

    Raises
    ------
    BuildError
        If the config bounds registers by blocks on a multiprocessor, for which TVM's generator has no word.
    """
    if config.blocks_per_sm:
        raise BuildError(
            f"Invalid blocks_per_sm of {config.name} for an AMD GPU: expected 0, got {config.blocks_per_sm}. Take the "
            "config of rpe_tvm.plan.rocm."
        )
    lowered = lower_gpu.lower(config, rocm.WIDEST_ROW)
    functions = {
        str(function.attrs["global_symbol"]): rocm.with_fixed_shared_memory(function)
        for function in lowered.mod.functions.values()
        if CALLS_ATTRIBUTE not in function.attrs
    }
    return Lowered(tvm.IRModule(functions), lowered.schedule)
