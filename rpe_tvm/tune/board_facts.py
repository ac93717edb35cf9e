"""What board a session runs on, from the text of `board.cc`: its name, its CPU's flags, whether it is emulated."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from rpe_tvm.machine import ARM
from rpe_tvm.runtime.cpu import parse_flags
from rpe_tvm.runtime.hwcap import named_flags

# Cores of Arm Ltd by their part number. Source: Linux, arch/arm64/include/asm/cputype.h.
_ARM_LTD = "0x41"
_CORES = {
    "0xc07": "Cortex-A7",
    "0xd03": "Cortex-A53",
    "0xd05": "Cortex-A55",
    "0xd07": "Cortex-A57",
    "0xd08": "Cortex-A72",
    "0xd0b": "Cortex-A76",
    "0xd0c": "Neoverse N1",
    "0xd40": "Neoverse V1",
    "0xd4f": "Neoverse V2",
}


@dataclass(frozen=True)
class Board:
    """A machine behind an RPC server.

    Parameters
    ----------
    name : str
        Model and cores.
    flags : frozenset of str
        What its CPU can do, named as in `TargetSpec.features`.
    is_emulated : bool
        Whether an emulator runs it, so that its times mean nothing. QEMU's user mode is found out; a whole emulated
        system looks like a real one.
    """

    name: str
    flags: frozenset[str]
    is_emulated: bool


def parse(text: str, machine: str) -> Board:
    """Return the board that `prepare` of `board.cc` described; `machine` is that of the target."""
    head, _, cpuinfo = text.partition("\ncpuinfo:\n")
    fields = dict(line.split(": ", 1) for line in head.splitlines() if ": " in line)
    if machine not in ARM:
        flags, names = parse_flags(cpuinfo), _values(cpuinfo, "model name")
        is_emulated = not names
    else:
        flags = named_flags(machine, int(fields["hwcap"]), int(fields["hwcap2"]))
        names = [
            _CORES.get(part, part) if implementer == _ARM_LTD else f"{implementer}/{part}"
            for implementer, part in zip(_values(cpuinfo, "CPU implementer"), _values(cpuinfo, "CPU part"), strict=True)
        ]
        # an emulated process reads the /proc/cpuinfo of the machine that emulates, or none
        is_emulated = not names
    if is_emulated or "qemu" in fields.get("server", ""):
        return Board(f"emulated {fields['machine']}", flags, True)
    cores = ", ".join(f"{count} x {name}" for name, count in Counter(names).items())
    return Board(", ".join(part for part in (fields.get("model", "").strip(), cores) if part), flags, False)


def _values(cpuinfo: str, key: str) -> list[str]:
    """The value of every processor's line called `key`."""
    lines = (line.partition(":") for line in cpuinfo.splitlines())
    return [value.strip() for name, _, value in lines if name.strip() == key]
