"""ARM targets: 64-bit CPUs with NEON, and 32-bit ones with NEON and VFPv4."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rpe_tvm import llvm
from rpe_tvm.errors import BuildError
from rpe_tvm.machine import AARCH64, ARMV7
from rpe_tvm.target_spec import TargetSpec

if TYPE_CHECKING:
    from tvm.target import Target

# Name -> machine and LLVM's name of the CPU.
PRESETS = {
    "aarch64": (AARCH64, "generic"),
    "cortex-a53": (AARCH64, "cortex-a53"),
    "cortex-a72": (AARCH64, "cortex-a72"),
    "cortex-a76": (AARCH64, "cortex-a76"),
    "neoverse-n1": (AARCH64, "neoverse-n1"),
    "neoverse-v1": (AARCH64, "neoverse-v1"),
    "neoverse-v2": (AARCH64, "neoverse-v2"),
    "armv7": (ARMV7, "cortex-a7"),
    "cortex-a7": (ARMV7, "cortex-a7"),
}

_LANES = 4  # of NEON's 128 bits

# LLVM's name of a CPU feature -> its flag in the Features of /proc/cpuinfo, for the features whose instructions LLVM
# selects by itself. Left out: features for the operating system, and those that only an explicit intrinsic uses (aes,
# crc, ...), which some boards lack although their core could have them.
CPUINFO_FLAGS: dict[str, dict[str, str]] = {
    AARCH64: {
        "fp-armv8": "fp",
        "neon": "asimd",
        "lse": "atomics",
        "rcpc": "lrcpc",
        "rcpc-immo": "ilrcpc",
        "lse2": "uscat",
        "rdm": "asimdrdm",
        "fullfp16": "asimdhp",
        "fp16fml": "asimdfhm",
        "dotprod": "asimddp",
        "complxnum": "fcma",
        "jsconv": "jscvt",
        "sha3": "sha3",
        "flagm": "flagm",
        "altnzcv": "flagm2",
        "fptoint": "frint",
        "i8mm": "i8mm",
        "bf16": "bf16",
    },
    ARMV7: {"neon": "neon", "vfp4": "vfpv4", "hwdiv-arm": "idiva", "hwdiv": "idivt"},
}

# Never used: vectors here have a fixed number of lanes, and NEON reaches the same rate on both Neoverse V.
_OFF = frozenset(("sve", "sve2", "sve2p1", "sve-bitperm", "sme", "sme2"))

# CPUs for which LLVM writes code as for another one: for Cortex-A53 it unrolls loops until they spill (246 of 3831
# instructions in butterflies of radix 4, and 93 of 2134), in as many cycles by its own model of the core.
_CODE_OF = {"cortex-a53": "generic"}

# Why LLVM avoids fused multiply-adds on Cortex-A7: a sum of one accumulator waits for each of them. Ours have eight or
# more, so that nothing waits, and half the instructions are saved.
_SLOW_FMA = ("slowfpvfmx", "vmlx-hazards")


def is_arm(name: str) -> bool:
    """Whether `name` is that of an ARM target."""
    return name in PRESETS


def preset(name: str) -> TargetSpec:
    """The ARM target called `name`, one of `PRESETS`."""
    machine, mcpu = PRESETS[name]
    return _spec(machine, mcpu, _needed_flags(machine, mcpu))


def detect(machine: str, have: frozenset[str]) -> TargetSpec:
    """The target of this machine's CPU.

    Parameters
    ----------
    machine
        ``aarch64`` or ``armv7``.
    have
        Flags of this machine's CPU. One that its model has and this machine lacks is left out of `features`, and
        `to_tvm` then forbids LLVM to use it.

    Raises
    ------
    BuildError
        If the CPU has no NEON.
    """
    mcpu = llvm.host_cpu()
    _, fallback = PRESETS[machine]
    if mcpu == "generic" or mcpu not in llvm.cpu_names(_target(machine, fallback)):
        mcpu = fallback
    required = {CPUINFO_FLAGS[machine]["neon"], CPUINFO_FLAGS[machine].get("vfp4", "fp")}
    if not required <= have:
        raise BuildError(
            f"Unsupported CPU: rpe_tvm needs {' and '.join(sorted(required))} on {machine}, this one has "
            f"{' '.join(sorted(have)) or 'no flags in /proc/cpuinfo'}."
        )
    return _spec(machine, mcpu, _needed_flags(machine, mcpu) & have)


def to_tvm(spec: TargetSpec) -> Target:
    """The TVM target of `spec`. Imports tvm."""
    allowed, flags = set(spec.features), CPUINFO_FLAGS[spec.machine]
    forbidden = sorted(
        feature
        for feature in llvm.cpu_features(_target(spec.machine, spec.mcpu))
        if feature in _OFF or (feature in flags and flags[feature] not in allowed)
    )
    return _target(spec.machine, _CODE_OF.get(spec.mcpu, spec.mcpu), forbidden)


def _spec(machine: str, mcpu: str, flags: frozenset[str]) -> TargetSpec:
    return TargetSpec(f"{machine}-{mcpu}", "llvm", mcpu, _LANES, tuple(sorted(flags)), machine)


def _needed_flags(machine: str, mcpu: str) -> frozenset[str]:
    flags = CPUINFO_FLAGS[machine]
    return frozenset(flags[f] for f in llvm.cpu_features(_target(machine, mcpu)) if f in flags)


def _target(machine: str, mcpu: str, forbidden: Sequence[str] = ()) -> Target:
    from tvm.target import Target

    # +neon is not for LLVM, which knows by the CPU, but for TVM's rules that ask for it
    attributes = ["+neon", *(f"-{feature}" for feature in forbidden)]
    common = {"kind": "llvm", "mcpu": mcpu, "cl-opt": list(llvm.OPTIONS)}
    if machine == AARCH64:
        return Target({**common, "mtriple": "aarch64-linux-gnu", "mattr": attributes})
    return Target(
        {
            **common,
            "mtriple": "armv7a-linux-gnueabihf",
            "mfloat-abi": "hard",
            "mattr": attributes + [f"-{feature}" for feature in _SLOW_FMA],
        }
    )
