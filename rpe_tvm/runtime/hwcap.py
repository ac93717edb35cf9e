"""What the kernel tells a process of an ARM CPU: the hardware capabilities in its auxiliary vector.

They are the same flags as in /proc/cpuinfo, which a process under user-mode emulation reads from the machine that
emulates. Source: Linux, Documentation/arch/arm64/elf_hwcaps.rst and include/uapi/asm/hwcap.h of both architectures.
"""

from __future__ import annotations

import ctypes

from rpe_tvm.machine import ARMV7

_AT_HWCAP, _AT_HWCAP2 = 16, 26

# From bit 0 on.
_AARCH64 = (
    "fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm jscvt fcma lrcpc "
    "dcpop sha3 sm3 sm4 asimddp sha512 sve asimdfhm dit uscat ilrcpc flagm ssbs sb paca pacg"
)
_AARCH64_2 = (
    "dcpodp sve2 sveaes svepmull svebitperm svesha3 svesm4 flagm2 frint svei8mm svef32mm svef64mm svebf16 i8mm bf16 "
    "dgh rng bti"
)
_ARMV7 = (
    "swp half thumb 26bit fastmult fpa vfp edsp java iwmmxt crunch thumbee neon vfpv3 vfpv3d16 tls "
    "vfpv4 idiva idivt vfpd32 lpae evtstrm"
)


def arm_flags(machine: str) -> frozenset[str]:
    """The flags of this process's CPU; `machine` is ``aarch64`` or ``armv7``."""
    getauxval = ctypes.CDLL(None).getauxval
    getauxval.restype, getauxval.argtypes = ctypes.c_ulong, [ctypes.c_ulong]
    return named_flags(machine, getauxval(_AT_HWCAP), getauxval(_AT_HWCAP2))


def named_flags(machine: str, hwcap: int, hwcap2: int) -> frozenset[str]:
    """The flags that both words of capabilities stand for; `machine` is ``aarch64`` or ``armv7``."""
    if machine == ARMV7:
        return _named_bits(hwcap, _ARMV7)
    return _named_bits(hwcap, _AARCH64) | _named_bits(hwcap2, _AARCH64_2)


def _named_bits(value: int, names: str) -> frozenset[str]:
    return frozenset(name for bit, name in enumerate(names.split()) if value >> bit & 1)
