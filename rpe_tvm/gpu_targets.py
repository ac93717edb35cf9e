"""GPU targets: which NVIDIA GPUs a library is compiled for and what they offer. AMD's are in `rpe_tvm.rocm_targets`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rpe_tvm.errors import BuildError, GpuNotFoundError
from rpe_tvm.plan.cuda_limits import SHARED_KIB

if TYPE_CHECKING:
    from tvm.target import Target

_MAX_THREADS = 1024  # of a block, on all of them

DEFAULT_ARCH = "sm_90"
# Every library holds machine code for these: one file serves Ampere and Hopper.
_COMMON = ("sm_80", "sm_90")


@dataclass(frozen=True)
class GpuTargetSpec:
    """GPUs to compile for.

    Attributes
    ----------
    id
        Name in artefacts and tuning logs, ``cuda-<arch>`` or ``rocm-<arch>``.
    kind
        TVM's target kind, ``cuda`` or ``rocm``.
    arch
        The architecture that algorithms and schedules are chosen for, such as ``sm_90`` or ``gfx942``.
    architectures
        All architectures that get machine code, ascending. Newer GPUs of NVIDIA's run the PTX of the last one.
    max_threads
        Threads that a block may have.
    shared_bytes
        Shared memory that a block may have on `arch`.
    """

    id: str
    kind: str
    arch: str
    architectures: tuple[str, ...]
    max_threads: int
    shared_bytes: int

    def to_json(self) -> dict[str, Any]:
        """What a manifest says of it."""
        return {"id": self.id, "kind": self.kind, "arch": self.arch}


def is_gpu(name: str) -> bool:
    """Whether `name` is that of a GPU target: ``cuda`` or ``sm_<number>``."""
    return name == "cuda" or name.startswith("sm_")


def preset(name: str) -> GpuTargetSpec:
    """The target called `name`: ``cuda`` for this machine's first GPU, or `DEFAULT_ARCH` where there is none; else an
    architecture, ``sm_80``, ``sm_90``, ...

    Raises
    ------
    BuildError
        For an architecture that is not known here.
    """
    if name == "cuda":
        # Not at the top: rpe_tvm.runtime imports tvm_ffi, and looking at a GpuTargetSpec needs neither.
        from rpe_tvm.runtime.gpu import gpus

        try:
            name = gpus()[0].arch
        except GpuNotFoundError:
            name = DEFAULT_ARCH
    shared_bytes = shared_bytes_of(name)
    architectures = tuple(sorted({name, *_COMMON}, key=capability))
    return GpuTargetSpec(f"cuda-{name}", "cuda", name, architectures, _MAX_THREADS, shared_bytes)


def shared_bytes_of(arch: str) -> int:
    """Shared memory that one block may have on an architecture; `BuildError` if it is not known here."""
    if arch not in SHARED_KIB:
        raise BuildError(
            f"Unknown GPU architecture {arch!r}: expected 'cuda' (this machine's GPU) or one of "
            f"{', '.join(SHARED_KIB)}. Newer GPUs run what is compiled for {DEFAULT_ARCH}; older ones than sm_80 are "
            "not supported."
        )
    return SHARED_KIB[arch] * 1024


def capability(arch: str) -> int:
    """The number of an architecture: 90 of ``sm_90``."""
    return int(arch.removeprefix("sm_"))


def to_tvm(spec: GpuTargetSpec) -> Target:
    """The TVM target of `spec`, with a host that every x86-64 CPU can be. Imports tvm."""
    from tvm.target import Target

    return Target(
        {
            "kind": spec.kind,
            "arch": spec.arch,
            "max_num_threads": spec.max_threads,
            "max_threads_per_block": spec.max_threads,
            "max_shared_memory_per_block": spec.shared_bytes,
        },
        host={"kind": "llvm", "mcpu": "x86-64"},
    )
