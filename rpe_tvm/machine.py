"""Names of instruction sets, and which one this process has."""

from __future__ import annotations

import platform
import struct

X86, AARCH64, ARMV7 = "x86_64", "aarch64", "armv7"
ARM = (AARCH64, ARMV7)


def this_machine() -> str:
    """The instruction set of this process: one of the names above, or the system's name of another one."""
    name = platform.machine().lower()
    if name in (X86, "amd64"):
        return X86
    if name in (AARCH64, "arm64", "armv7l", "armv8l"):
        return AARCH64 if struct.calcsize("P") == 8 else ARMV7  # a 64-bit kernel runs 32-bit processes, too
    return name
