"""Targets: which CPU a library is compiled for and what it needs there.

ARM CPUs are in `rpe_tvm.arm_targets`, GPUs in `rpe_tvm.gpu_targets` and `rpe_tvm.rocm_targets`.
"""

from __future__ import annotations

import difflib
import functools
from typing import TYPE_CHECKING, Any

from rpe_tvm import arm_targets, gpu_targets, llvm, rocm_targets
from rpe_tvm.errors import BuildError
from rpe_tvm.gpu_targets import GpuTargetSpec
from rpe_tvm.machine import ARM, X86, this_machine
from rpe_tvm.target_spec import TargetSpec

if TYPE_CHECKING:
    from tvm.target import Target

# LLVM's name of a CPU feature -> its flag in /proc/cpuinfo, for the features whose instructions LLVM selects
# by itself. Left out: the x86-64 baseline (every CPU has it), and features that only an explicit intrinsic or
# the operating system uses (amx-*, pku, mwaitx, ...), which hypervisors often hide and which our kernels
# never use.
CPUINFO_FLAGS: dict[str, str] = {
    "sse3": "pni",
    "ssse3": "ssse3",
    "sse4.1": "sse4_1",
    "sse4.2": "sse4_2",
    "sse4a": "sse4a",
    "cx16": "cx16",
    "sahf": "lahf_lm",
    "popcnt": "popcnt",
    "movbe": "movbe",
    "lzcnt": "abm",
    "bmi": "bmi1",
    "bmi2": "bmi2",
    "tbm": "tbm",
    "prfchw": "3dnowprefetch",
    "gfni": "gfni",
    "avx": "avx",
    "avx2": "avx2",
    "f16c": "f16c",
    "fma": "fma",
    "fma4": "fma4",
    "xop": "xop",
    "avxvnni": "avx_vnni",
    "avxvnniint8": "avx_vnni_int8",
    "avxvnniint16": "avx_vnni_int16",
    "avxifma": "avx_ifma",
    "avxneconvert": "avx_ne_convert",
    "avx512f": "avx512f",
    "avx512bw": "avx512bw",
    "avx512cd": "avx512cd",
    "avx512dq": "avx512dq",
    "avx512vl": "avx512vl",
    "avx512ifma": "avx512ifma",
    "avx512vbmi": "avx512vbmi",
    "avx512vbmi2": "avx512_vbmi2",
    "avx512vnni": "avx512_vnni",
    "avx512bitalg": "avx512_bitalg",
    "avx512vpopcntdq": "avx512_vpopcntdq",
    "avx512bf16": "avx512_bf16",
    "avx512fp16": "avx512_fp16",
}

# AVX10 and APX: LLVM would use them, and /proc/cpuinfo has no settled names to check them by. Always switched
# off.
_UNCHECKABLE = frozenset(
    ("avx10.1", "avx10.2", "ccmp", "cf", "egpr", "ndd", "nf", "ppx", "push2pop2", "zu"),
)

# What a CPU falls back to whose vector registers are narrower than its name promises (a hypervisor can hide
# AVX-512).
_AVX2_CPU = "haswell"


__all__ = ["AnyTarget", "TargetSpec", "detect", "has_avx512", "preset", "to_tvm"]

AnyTarget = TargetSpec | GpuTargetSpec


def preset(name: str) -> AnyTarget:
    """The target called `name`.

    Parameters
    ----------
    name
        ``cpu`` for this machine's CPU; ``x86`` for the same, which must be an x86 one then; an x86 CPU name of LLVM's
        (``haswell``, ``znver4``, ...); an ARM CPU of `arm_targets.PRESETS`; ``cuda`` for this machine's NVIDIA GPU, or
        a GPU architecture (``sm_80``, ``sm_90``, ..., ``gfx942``, ...).

    Raises
    ------
    BuildError
        For a name that neither LLVM nor the modules of GPU targets know, and for a CPU without AVX2 and FMA.
    """
    if gpu_targets.is_gpu(name):
        return gpu_targets.preset(name)
    if rocm_targets.is_rocm(name):
        return rocm_targets.preset(name)
    if arm_targets.is_arm(name):
        return arm_targets.preset(name)
    if name in ("cpu", "x86"):
        here = detect()
        if name == "x86" and here.machine != X86:
            raise BuildError(
                f"Target 'x86' means this machine's CPU, which is {here.machine}: expected 'cpu' or an x86 CPU's name."
            )
        return here
    known = llvm.cpu_names(_target(_AVX2_CPU))
    if name not in known:
        close = difflib.get_close_matches(name, [*known, *arm_targets.PRESETS], n=3)
        hint = f" Did you mean {' or '.join(close)}?" if close else ""
        raise BuildError(
            f"Unknown target {name!r}: expected 'x86' (this machine's CPU), an x86 CPU name of LLVM's, such as "
            f"haswell, skylake-avx512 or znver4, an ARM CPU ({', '.join(arm_targets.PRESETS)}), 'cuda' (this machine's "
            f"GPU), sm_80, sm_90, ..., or gfx90a, gfx942, gfx1100, gfx1201.{hint}"
        )
    return _spec(name, _needed_flags(name))


@functools.lru_cache(maxsize=1)
def detect() -> TargetSpec:
    """The target of this machine's CPU.

    A flag that the CPU's model has and this machine lacks (virtual machines hide some) is left out of
    `features`, and `to_tvm` then forbids LLVM to use it.

    Raises
    ------
    BuildError
        If this machine is neither an x86-64 machine with AVX2 and FMA nor an ARM machine with NEON.
    """
    # Not at the top: rpe_tvm.runtime imports tvm_ffi, and looking at a TargetSpec needs neither.
    from rpe_tvm.runtime.cpu import cpu_flags

    here, have = this_machine(), cpu_flags()
    if here in ARM:
        return arm_targets.detect(here, have)
    if here != X86:
        raise BuildError(f"Unsupported machine {here!r}: this rpe_tvm compiles on x86-64, aarch64 and armv7.")
    mcpu = llvm.host_cpu()
    needed = _needed_flags(mcpu)
    if _lanes(needed) != _lanes(needed & have):
        mcpu = _AVX2_CPU
        needed = _needed_flags(mcpu)
    return _spec(mcpu, needed & have)


def to_tvm(spec: AnyTarget) -> Target:
    """The TVM target of `spec`. Imports tvm."""
    if isinstance(spec, GpuTargetSpec):
        return (rocm_targets if spec.kind == "rocm" else gpu_targets).to_tvm(spec)
    if spec.machine in ARM:
        return arm_targets.to_tvm(spec)
    allowed = set(spec.features)
    forbidden = sorted(
        feature
        for feature in llvm.cpu_features(_target(spec.mcpu))
        if feature in _UNCHECKABLE or (feature in CPUINFO_FLAGS and CPUINFO_FLAGS[feature] not in allowed)
    )
    return _target(spec.mcpu, tuple(f"-{feature}" for feature in forbidden))


def has_avx512(target: Target) -> bool:
    """Whether the CPU of a target of TVM's has AVX-512."""
    return "avx512f" in llvm.cpu_features(target)


def _spec(mcpu: str, flags: frozenset[str]) -> TargetSpec:
    lanes = _lanes(flags)
    if lanes == 0:
        raise BuildError(f"Unsupported CPU {mcpu}: rpe_tvm needs AVX2 and FMA (2013 and later on most x86 CPUs).")
    return TargetSpec(id=f"x86_64-{mcpu}", kind="llvm", mcpu=mcpu, lanes=lanes, features=tuple(sorted(flags)))


def _lanes(flags: frozenset[str]) -> int:
    if not {"avx2", "fma"} <= flags:
        return 0
    return 16 if "avx512f" in flags else 8


def _needed_flags(mcpu: str) -> frozenset[str]:
    return frozenset(CPUINFO_FLAGS[f] for f in llvm.cpu_features(_target(mcpu)) if f in CPUINFO_FLAGS)


def _target(mcpu: str, mattr: tuple[str, ...] = ()) -> Target:
    from tvm.target import Target

    config: dict[str, Any] = {"kind": "llvm", "mcpu": mcpu, "cl-opt": list(llvm.OPTIONS)}
    if mattr:
        config["mattr"] = list(mattr)
    return Target(config)
