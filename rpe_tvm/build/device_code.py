"""From scheduled functions to host code and CUDA source, and how compiled device code gets into a library."""

from __future__ import annotations

import os
import re
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rpe_tvm.errors import BuildError

if TYPE_CHECKING:
    import tvm

# Attribute of a function: how many blocks of threads a multiprocessor shall hold, which bounds the registers of one.
BLOCKS_ATTRIBUTE = "rpe_tvm.blocks_per_sm"
# Attribute of a function that calls functions of its library and launches no kernel itself.
CALLS_ATTRIBUTE = "rpe_tvm.calls"
# Attribute of a function whose kernels load again in each turn of a loop what stays the same. nvcc would hold it in
# registers, since TVM promises that nothing else writes there, and spill them.
RELOAD_ATTRIBUTE = "rpe_tvm.reload"
# Attribute of a function whose constant tables lie at multiples of 16 bytes: nvcc loads both parts of a complex number
# at once where it knows that. Only this library makes tables.
ALIGNED_ATTRIBUTE = "rpe_tvm.aligned_tables"
# Attribute of a function whose kernels have instructions of this architecture (90, say) and later: machine code for
# those before traps, and nothing calls it there.
ARCH_ATTRIBUTE = "rpe_tvm.arch"
# Attribute of a function whose kernels may need more than some of a library's architectures have: it is called only
# where they fit, and others do the same elsewhere.
OPTIONAL_ATTRIBUTE = "rpe_tvm.optional"
# Attribute of a function whose kernels may be launched while the kernel before them in the stream still runs, as they
# wait for it themselves (`te.cuda_warp.wait_for_kernels_before`). For sm_90 and later.
OVERLAP_ATTRIBUTE = "rpe_tvm.overlaps"
# What TVM's runtime calls such a launch, and its attribute of a kernel that lists launch parameters.
_OVERLAP_TAG, _LAUNCH_PARAMETERS = "tirx.use_programtic_dependent_launch", "tirx.kernel_launch_params"
# Makes TVM keep the CUDA source instead of compiling it at once, which it tries where a driver is present.
_KEEP_SOURCE = "TVM_COMPILE_FORCE_FALLBACK"


@dataclass(frozen=True)
class DeviceCode:
    """What TVM makes of functions for a GPU.

    Attributes
    ----------
    host
        TVM's module of the host code: checks arguments and launches kernels.
    calls
        TVM's modules of the functions that call those of `host`, one each: the linker resolves their symbols, while
        TVM declares a symbol for every call, and a second one in a module gets another name.
    source
        The kernels in CUDA C++.
    shared_bytes
        Kernel -> shared memory of a block, that of the launch included.
    optional
        The kernels among them that the library can do without.
    """

    host: Any
    calls: tuple[Any, ...]
    source: str
    shared_bytes: dict[str, int]
    optional: frozenset[str]


def generate(mod: tvm.IRModule, target: tvm.target.Target, name: str) -> DeviceCode:
    """Generate host code and CUDA source.

    Parameters
    ----------
    mod
        Functions whose schedules bind loops to blocks and threads.
    target
        A CUDA target with a host.
    name
        Name of the artefact, for messages.

    Raises
    ------
    BuildError
        If TVM cannot generate code, or a function runs on the host alone.
    """
    try:
        callers, launchers = _filter(mod, lambda function: CALLS_ATTRIBUTE in function.attrs)
        host, device = _split(launchers, target)
        _mark_overlapping(device, mod)
        with _source_is_kept():
            host_module, source = _generate(host, device, target)
            calls = tuple(_generate(*_split(each, target), target)[0] for each in _one_by_one(callers))
        source = _with_aligned_tables(_without_promises(_bound_registers(source, mod), mod), mod)
        source = _empty_before(source, mod)
    except BuildError:
        raise
    except Exception as error:  # TVM raises whatever class its C++ code named
        raise BuildError(f"TVM could not compile {name} for {target}: {error}") from error
    shared_bytes = kernel_shared_bytes(device)
    for function in launchers.functions.values():
        symbol = str(function.attrs["global_symbol"])
        if not any(kernel.startswith(f"{symbol}_kernel") for kernel in shared_bytes):
            raise BuildError(
                f"The function {symbol} of {name} has no kernel: its schedule binds no loop to blocks and threads, so "
                "it would read device memory on the host."
            )
    optional = frozenset(
        kernel
        for function in launchers.functions.values()
        if OPTIONAL_ATTRIBUTE in function.attrs
        for kernel in shared_bytes
        if kernel.startswith(f"{function.attrs['global_symbol']}_kernel")
    )
    return DeviceCode(host_module, calls, source, shared_bytes, optional)


def blob(code: DeviceCode, binary: bytes) -> bytes:
    """The data that TVM's loader reads from a library: `code`'s kernels, with `binary` in place of their source.

    TVM writes ``total size, tree of modules, "_lib", "cuda", size, module`` with the module ``"cuda" (it holds source),
    table of kernels, size, source``; every string is its size and its bytes, sizes are 8 bytes. Written back is the
    same with ``"fatbin"`` and the binary.
    """
    import numpy as np
    import tvm_ffi

    packed = np.from_dlpack(tvm_ffi.get_global_func("runtime.ModulePackImportsToTensor")(code.host)).tobytes()
    # as TVM made it, without what we wrote into `code.source`
    source = _string(str(code.host.imports[0].inspect_source()).encode())
    head, kind, rest = packed.partition(_string(b"cuda"))
    module = rest[8:]
    table = module.removeprefix(_string(b"cuda")).removesuffix(source)
    if packed != head + kind + _size(len(module)) + _string(b"cuda") + table + source:
        raise BuildError(
            "TVM packed device code in a form that this rpe_tvm does not know. Install the pinned version."
        )
    module = _string(b"fatbin") + table + _string(binary)
    body = head[8:] + kind + _string(module)
    return _size(len(body)) + body


def _split(mod: tvm.IRModule, target: tvm.target.Target) -> tuple[tvm.IRModule, tvm.IRModule]:
    """The host's and the GPU's part of `mod`, lowered: the steps of ``tvm.tirx.build.build`` up to code generation."""
    import tvm
    from tvm.tirx import get_default_tir_pipeline

    lower, finish_host, finish_device = get_default_tir_pipeline(target)
    lowered = lower(tvm.tirx.transform.BindTarget(target)(mod))

    def is_host(function: Any) -> bool:
        return str(function.attrs["target"].kind.name) == "llvm"

    host, device = _filter(lowered, is_host)
    return finish_host()(host), finish_device()(device)


def _filter(mod: tvm.IRModule, belongs: Callable[[Any], bool]) -> tuple[tvm.IRModule, tvm.IRModule]:
    """The functions that belong, and the others."""
    import tvm

    inside = tvm.tirx.transform.Filter(belongs)(mod)
    return inside, tvm.tirx.transform.Filter(lambda function: not belongs(function))(mod)


def _one_by_one(mod: tvm.IRModule) -> Iterator[tvm.IRModule]:
    for name, function in mod.functions_items():
        yield type(mod)({name: function})


def _mark_overlapping(device: tvm.IRModule, mod: tvm.IRModule) -> None:
    """Let kernels of functions with `OVERLAP_ATTRIBUTE` be launched early."""
    for function in mod.functions.values():
        if OVERLAP_ATTRIBUTE in function.attrs:
            symbol = f"{function.attrs['global_symbol']}_kernel"
            kernels = [name for name, kernel in device.functions_items() if _symbol(kernel).startswith(symbol)]
            for name in kernels:
                tags = [_OVERLAP_TAG, *device[name].attrs[_LAUNCH_PARAMETERS]]
                device[name] = device[name].with_attr(_LAUNCH_PARAMETERS, tags)
            if not kernels:
                raise BuildError(f"The function {symbol} has no kernel in a form that this rpe_tvm knows.")


def _symbol(function: Any) -> str:
    return str(function.attrs["global_symbol"])


def _bound_registers(source: str, mod: tvm.IRModule) -> str:
    """Write `BLOCKS_ATTRIBUTE` of functions into the launch bounds of their kernels: schedules have no word for it."""
    for function in mod.functions.values():
        if BLOCKS_ATTRIBUTE in function.attrs:
            symbol, blocks = function.attrs["global_symbol"], int(function.attrs[BLOCKS_ATTRIBUTE])
            pattern = rf"__launch_bounds__\((\d+)\) ({symbol}_kernel\w*\()"
            source, count = re.subn(pattern, rf"__launch_bounds__(\1, {blocks}) \2", source)
            if count == 0:
                raise BuildError(f"The kernels of {symbol} have no launch bounds in a form that this rpe_tvm knows.")
    return source


def _without_promises(source: str, mod: tvm.IRModule) -> str:
    """Drop ``__restrict__`` from the kernels of functions with `RELOAD_ATTRIBUTE`: loads stay behind barriers then."""
    for function in mod.functions.values():
        if RELOAD_ATTRIBUTE in function.attrs:
            symbol = function.attrs["global_symbol"]
            pattern = rf"(?<= ){symbol}_kernel\w*\([^)]*__restrict__[^)]*\)"
            source, count = re.subn(pattern, lambda found: found[0].replace(" __restrict__", ""), source)
            if count == 0:
                raise BuildError(f"The kernels of {symbol} promise nothing in a form that this rpe_tvm knows.")
    return source


def _with_aligned_tables(source: str, mod: tvm.IRModule) -> str:
    """Write `ALIGNED_ATTRIBUTE` of functions into their kernels."""
    for function in mod.functions.values():
        if ALIGNED_ATTRIBUTE in function.attrs:
            symbol = function.attrs["global_symbol"]
            promise = "  tables_ptr = (float*)__builtin_assume_aligned(tables_ptr, 16);\n"
            pattern = rf"( {symbol}_kernel\w*\([^)]*float\* (?:__restrict__ )?tables_ptr[^)]*\) \{{\n)"
            source, count = re.subn(pattern, rf"\1{promise}", source)
            if count == 0:
                raise BuildError(f"The kernels of {symbol} have no tables in a form that this rpe_tvm knows.")
    return source


def _empty_before(source: str, mod: tvm.IRModule) -> str:
    """Leave out the bodies of kernels of functions with `ARCH_ATTRIBUTE` on architectures before it."""
    for function in mod.functions.values():
        if ARCH_ATTRIBUTE in function.attrs:
            symbol, arch = function.attrs["global_symbol"], int(function.attrs[ARCH_ATTRIBUTE])
            older = f"#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < {10 * arch}\n  __trap();\n#else\n"
            pattern = rf"( {symbol}_kernel\w*\([^)]*\) \{{\n)(.*?)(\n\}}\n)"
            source, count = re.subn(pattern, rf"\1{older}\2\n#endif\3", source, flags=re.DOTALL)
            if count == 0:
                raise BuildError(f"The kernels of {symbol} have no body in a form that this rpe_tvm knows.")
    return source


def _generate(host: tvm.IRModule, device: tvm.IRModule, target: tvm.target.Target) -> tuple[Any, str]:
    import tvm_ffi

    module = tvm_ffi.get_global_func("target.build.llvm")(host, target.host)
    if not device.functions:
        return module, ""
    kernels = tvm_ffi.get_global_func("target.build.cuda")(device, target)
    module.import_module(kernels)
    return module, str(kernels.inspect_source())


def kernel_shared_bytes(device: tvm.IRModule) -> dict[str, int]:
    """Kernel -> shared memory of a block, from lowered kernels."""
    from tvm.s_tir.analysis import calculate_allocated_bytes

    found = {}
    for kernel in device.functions.values():
        scopes = calculate_allocated_bytes(kernel)["main"]
        found[str(kernel.attrs["global_symbol"])] = sum(int(scopes.get(scope, 0)) for scope in ("shared", "shared.dyn"))
    return found


@contextmanager
def _source_is_kept() -> Iterator[None]:
    before = os.environ.get(_KEEP_SOURCE)
    os.environ[_KEEP_SOURCE] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[_KEEP_SOURCE]
        else:
            os.environ[_KEEP_SOURCE] = before


def _size(size: int) -> bytes:
    return struct.pack("<Q", size)


def _string(text: bytes) -> bytes:
    return _size(len(text)) + text
