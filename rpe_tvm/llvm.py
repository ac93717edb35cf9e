"""What the LLVM inside TVM knows of CPUs. Everything here imports tvm."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tvm.target import Target


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
