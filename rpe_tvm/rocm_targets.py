"""AMD GPU targets: which GPUs a code object is compiled for."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rpe_tvm.errors import BuildError
from rpe_tvm.gpu_targets import GpuTargetSpec
from rpe_tvm.plan.rocm_limits import MAX_THREADS, PREFIX, SHARED_BYTES, WAVES

if TYPE_CHECKING:
    from tvm.target import Target


def is_rocm(name: str) -> bool:
    """Whether `name` is that of an AMD GPU target: ``gfx<number>``."""
    return name.startswith("gfx")


def preset(name: str) -> GpuTargetSpec:
    """The target of an architecture: ``gfx90a``, ``gfx942``, ``gfx1100`` or ``gfx1201``.

    Raises
    ------
    BuildError
        For an architecture that is not known here.
    """
    if name not in WAVES:
        raise BuildError(
            f"Unknown architecture of AMD GPUs {name!r}: expected one of {', '.join(WAVES)}. A code object runs on no "
            "other architecture than its own."
        )
    return GpuTargetSpec(PREFIX + name, "rocm", name, (name,), MAX_THREADS, SHARED_BYTES)


def to_tvm(spec: GpuTargetSpec) -> Target:
    """The TVM target of `spec`. Imports tvm. Its host is never compiled for: kernels are launched by HIP alone."""
    from tvm.target import Target

    return Target(
        {
            "kind": spec.kind,
            "mcpu": spec.arch,
            "thread_warp_size": WAVES[spec.arch],
            "max_num_threads": spec.max_threads,
            "max_threads_per_block": spec.max_threads,
            "max_shared_memory_per_block": spec.shared_bytes,
        },
        host={"kind": "llvm", "mcpu": "x86-64"},
    )
