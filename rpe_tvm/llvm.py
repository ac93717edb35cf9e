"""What the LLVM inside TVM knows of CPUs. Everything here imports tvm."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tvm.target import Target

# Of all targets. By default LLVM gives up on removing repeated loads in functions as large as ours: on x86 butterflies
# of radix 8 then run at half the speed (measured), on ARM those of radix 5 take twice the arithmetic (counted).
OPTIONS = ("-memdep-block-scan-limit:int=4000", "-earlycse-mssa-optimization-cap:int=4000")


def host_cpu() -> str:
    """LLVM's name of this machine's CPU, ``generic`` if it knows none."""
    return str(_call("tvm.codegen.llvm.GetHostCPUName"))


def cpu_names(target: Target) -> list[str]:
    """LLVM's names of all CPUs with the instruction set of `target`."""
    return [str(name) for name in _call("target.llvm_get_cpu_archlist", target)]


def cpu_features(target: Target) -> frozenset[str]:
    """LLVM's names of what the CPU of `target` has."""
    return frozenset(str(feature) for feature in _call("target.llvm_get_cpu_features", target))


def _call(function: str, *arguments: object) -> Any:
    import tvm  # registers the functions
    import tvm_ffi

    assert tvm is not None
    return tvm_ffi.get_global_func(function)(*arguments)
