"""Builds code objects for AMD GPUs, without AMD's software: TVM's LLVM compiles, LLVM's linker links, and what comes
out is checked before anything runs it."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rpe_tvm.build import code_object, lld
from rpe_tvm.build.device_code import kernel_shared_bytes
from rpe_tvm.errors import BuildError
from rpe_tvm.gpu_targets import GpuTargetSpec
from rpe_tvm.plan.rocm_limits import WAVES

if TYPE_CHECKING:
    import tvm

LIBRARY = "kernels.hsaco"

# Registers of a thread: the largest number that an instruction can name, twice with waves of 64, whose second half
# holds what does not fit into the first.
_REGISTERS = {64: 512, 32: 256}
# Fused multiply-adds of one number, two numbers, and two instructions in one.
_FUSED = re.compile(r"^\s+v_(?:fma|fmac|pk_fma|dual_fmac)_f32", re.MULTILINE)


def fingerprint(target: GpuTargetSpec) -> dict[str, object]:
    """What building contributes to a code object, for its cache key."""
    return {"lld": list(lld.FLAGS), "arch": target.arch}


def build(
    mod: tvm.IRModule, target: GpuTargetSpec, tvm_target: tvm.target.Target, name: str, library: Path
) -> dict[str, Any]:
    """Write the code object of `mod`; returns the manifest's ``device``: how its kernels are launched, what they need.

    Parameters
    ----------
    mod
        Scheduled PrimFuncs.
    target, tvm_target
        The GPU to compile for, and TVM's form of it.
    name
        Name of the artefact, for messages.
    library
        The file to write.

    Raises
    ------
    CompilerNotFoundError
        If LLVM's linker is missing.
    BuildError
        If something does not compile, or `check` refuses the code object.
    """
    lld.find()  # before the compilation, which takes longer than to notice that it is missing
    functions, device = _split(mod, tvm_target, name)
    kernels = {kernel["name"]: kernel for function in functions.values() for kernel in function["kernels"]}
    _check_before(kernels, kernel_shared_bytes(device), target)
    image, assembly = _generate(device, tvm_target, name)
    uses = check(image, target, functions)
    library.write_bytes(image)
    fused = count_fused(assembly)
    for kernel, use in uses.items():
        kernels[kernel] |= {**use, "fused_multiply_adds": fused[kernel]}
    return {"arch": target.arch, "wave": WAVES[target.arch], "lld": lld.version(), "functions": functions}


def check(image: bytes, target: GpuTargetSpec, functions: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, int]]:
    """Raise `BuildError` unless a code object holds these kernels, as they are launched, within the target's limits.

    Returns
    -------
    dict
        Kernel -> bytes of local memory and registers.
    """
    found = code_object.read(image)
    wrong = []
    if found.machine != code_object.MACHINES[target.arch]:
        wrong.append(f"it is for machine {found.machine:#x}, expected {code_object.MACHINES[target.arch]:#x}")
    if found.undefined:
        wrong.append(f"undefined symbols: {', '.join(sorted(found.undefined))}")
    uses = {}
    for function in functions.values():
        tensors = {each["name"] for each in function["arguments"] if "shape" in each}
        for kernel in function["kernels"]:
            name, described = kernel["name"], found.kernels.get(kernel["name"])
            if described is None or not {name, f"{name}.kd"} <= found.defined:
                wrong.append(f"no kernel {name}")
                continue
            wrong += [f"{name}: {reason}" for reason in _faults(described, kernel, tensors, target)]
            uses[name] = {
                "shared_bytes": described["group_segment_fixed_size"],
                "vector_registers": described["vgpr_count"],
                "scalar_registers": described["sgpr_count"],
            }
    if wrong:
        raise BuildError(
            f"The code object for {target.arch} is refused: {'; '.join(wrong)}. Registers that spill and local memory "
            "take smaller radices or a shorter length; for anything else install the pinned version of TVM."
        )
    return uses


def _faults(
    described: Mapping[str, Any], kernel: Mapping[str, Any], tensors: set[str], target: GpuTargetSpec
) -> Iterator[str]:
    expected = [
        ("global_buffer" if rule in tensors else "by_value", 8 * index)
        for index, rule in enumerate(each if isinstance(each, str) else "" for each in kernel["arguments"])
    ]
    visible = [each for each in described.get("args", ()) if not each[".value_kind"].startswith("hidden_")]
    given = [(each[".value_kind"], each[".offset"]) for each in visible]
    if given != expected or any(each[".size"] != 8 for each in visible):
        yield f"arguments (kind, offset) {given} of 8 bytes each are expected to be {expected}"
    threads = kernel["block"][0] * kernel["block"][1] * kernel["block"][2]
    if described["max_flat_workgroup_size"] < threads:
        yield f"blocks of {threads} threads, and it allows {described['max_flat_workgroup_size']}"
    wave = WAVES[target.arch]
    if described["wavefront_size"] != wave:
        yield f"waves of {described['wavefront_size']} threads, expected {wave}"
    for key, most in (
        ("group_segment_fixed_size", target.shared_bytes),
        ("vgpr_count", _REGISTERS[wave]),
        ("private_segment_fixed_size", 0),
        ("vgpr_spill_count", 0),
        ("uses_dynamic_stack", False),
    ):
        if described[key] > most:
            yield f"{key} is {described[key]}, expected at most {most}"


def count_fused(assembly: str) -> dict[str, int]:
    """Kernel -> fused multiply-adds in its code, as the assembler's text has them."""
    parts = re.split(r"^(\w+):.*$", assembly, flags=re.MULTILINE)
    bodies = dict(zip(parts[1::2], parts[2::2], strict=True))
    return {name: len(_FUSED.findall(body)) for name, body in bodies.items()}


def _split(mod: tvm.IRModule, target: tvm.target.Target, name: str) -> tuple[dict[str, dict[str, Any]], tvm.IRModule]:
    """How the functions of `mod` are called and launch kernels, and the kernels, lowered up to code generation."""
    import tvm
    from tvm.tirx import get_default_tir_pipeline

    from rpe_tvm.build import launch_rules

    try:
        lower, _, finish_device = get_default_tir_pipeline(target)
        lowered = lower(tvm.tirx.transform.BindTarget(target)(mod))
        kernels = tvm.tirx.transform.Filter(lambda f: str(f.attrs["target"].kind.name) == "rocm")(lowered)
        device = finish_device()(kernels)
    except Exception as error:  # TVM raises whatever class its C++ code named
        raise BuildError(f"TVM could not compile {name} for {target}: {error}") from error
    hosts = {str(f.attrs["global_symbol"]): f for f in lowered.functions.values() if "global_symbol" in f.attrs}
    functions = {}
    for function in mod.functions.values():
        symbol = str(function.attrs["global_symbol"])
        arguments = launch_rules.arguments_of(function)
        tensors = frozenset(each["name"] for each in arguments if "shape" in each)
        launched = launch_rules.kernels_of(hosts[f"__tvm_ffi_{symbol}"], tensors)
        functions[symbol] = {"arguments": arguments, "kernels": launched}
        if not launched:
            raise BuildError(
                f"The function {symbol} of {name} has no kernel: its schedule binds no loop to blocks and threads."
            )
    names = [str(kernel["name"]) for function in functions.values() for kernel in function["kernels"]]
    made = [str(kernel.attrs["global_symbol"]) for kernel in device.functions.values()]
    if sorted(names) != sorted(made):
        raise BuildError(f"The host code of {name} launches {names} once each: expected {made}.")
    return functions, device


def _check_before(
    kernels: Mapping[str, Mapping[str, Any]], shared_bytes: Mapping[str, int], target: GpuTargetSpec
) -> None:
    """Raise `BuildError` for what LLVM ends the process at, and for blocks whose size is not known."""
    for name, kernel in kernels.items():
        x, y, z = kernel["block"]
        if not all(isinstance(size, int) for size in (x, y, z)) or x * y * z > target.max_threads:
            raise BuildError(
                f"The kernel {name} has blocks of {kernel['block']} threads: expected at most {target.max_threads} on "
                f"{target.arch}. Choose a config with fewer threads."
            )
        if shared_bytes[name] > target.shared_bytes:
            raise BuildError(
                f"The kernel {name} needs {shared_bytes[name]} bytes of local memory for each block, {target.arch} has "
                f"{target.shared_bytes}. Choose fewer features or channels, or a config with shorter rows."
            )


def _generate(device: tvm.IRModule, target: tvm.target.Target, name: str) -> tuple[bytes, str]:
    """The code object of the kernels, and their code as text."""
    import tvm_ffi

    from rpe_tvm.build import local_memory

    linked: list[bytes] = []

    def link(code: Any) -> bytearray:
        linked.append(lld.link(bytes(code)))
        return bytearray(linked[-1])

    with tempfile.TemporaryDirectory() as directory:
        barrier = Path(directory) / "barrier.ll"
        barrier.write_text(local_memory.BARRIER, encoding="ascii")
        # In the place of AMD's libraries of device code: LLVM itself knows exp, sqrt and division.
        with (
            _replaced("tvm_callback_rocm_bitcode_path", lambda *_: [str(barrier)]),
            _replaced("tvm_callback_rocm_link", link),
        ):
            try:
                module = tvm_ffi.get_global_func("target.build.rocm")(local_memory.corrected(device), target)
            except Exception as error:  # as above
                raise BuildError(f"TVM could not compile {name} for {target}: {error}") from error
    assembly = str(module.inspect_source("asm"))
    local_memory.check(str(module.inspect_source("llvm")), assembly)
    return linked[-1], assembly


@contextmanager
def _replaced(name: str, function: Any) -> Iterator[None]:
    """Put a function in the place of a global one of TVM's for a while."""
    import tvm.support.rocm  # defines them
    import tvm_ffi

    assert tvm is not None
    before = tvm_ffi.get_global_func(name)
    tvm_ffi.register_global_func(name, function, override=True)
    try:
        yield
    finally:
        tvm_ffi.register_global_func(name, before, override=True)
