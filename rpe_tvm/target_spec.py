"""What a compiled library has to know of its CPU."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rpe_tvm.machine import X86


@dataclass(frozen=True)
class TargetSpec:
    """A CPU to compile for.

    Attributes
    ----------
    id
        Name in artefacts and tuning logs, ``<machine>-<mcpu>``.
    kind
        TVM's target kind, ``llvm``.
    mcpu
        LLVM's name of the CPU.
    lanes
        float32 lanes of a vector register: 16 with AVX-512, 8 with AVX2, 4 with NEON.
    features
        Flags that /proc/cpuinfo of a machine must list for a compiled library to run there, sorted.
    machine
        The instruction set: ``x86_64``, ``aarch64`` or ``armv7``.
    """

    id: str
    kind: str
    mcpu: str
    lanes: int
    features: tuple[str, ...]
    machine: str = X86

    def to_json(self) -> dict[str, Any]:
        """What a manifest says of it; one without ``machine`` is of an x86-64 CPU."""
        fields = {"id": self.id, "kind": self.kind, "mcpu": self.mcpu, "cpu_features": list(self.features)}
        return fields if self.machine == X86 else {**fields, "machine": self.machine}
