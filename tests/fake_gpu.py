"""Libraries in the place of NVIDIA's driver and runtime: they report one GPU, and launches do nothing.

With them TVM's runtime for CUDA loads on a machine without a GPU, and everything up to a launch can be tested: in a
process of its own, because what is loaded stays.
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

# What rpe_tvm.runtime.gpu asks the driver. The variable FAKE_GPU names compute capability and bytes of shared memory.
_DRIVER = """
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
static int values[2];
int cuInit(unsigned flags) { return sscanf(getenv("FAKE_GPU"), "%d:%d", values, values + 1) == 2 ? 0 : 100; }
int cuDeviceGetCount(int* count) { *count = 1; return 0; }
int cuDeviceGet(int* device, int index) { *device = index; return 0; }
int launches;
int cuLaunchKernelEx(void) { return launches++, 0; }
int cuDeviceGetName(char* name, int size, int device) { strncpy(name, "Fake GPU", size); return 0; }
int cuDeviceGetAttribute(int* value, int which, int device) {
  *value = which == 75 ? values[0] / 10 : which == 76 ? values[0] % 10 : which == 97 ? values[1] : -1;
  return 0;
}
"""
_RUNTIME = "int cudaGetDevice(int* device) { *device = 0; return 0; }"


def write_libraries(directory: Path, tvm_runtime: Path) -> Path:
    """Write ``libcuda.so.1`` and ``libcudart.so.13`` with all that ``libtvm_runtime_cuda.so`` asks for."""
    symbols = subprocess.run(
        ["nm", "-D", "--undefined-only", tvm_runtime / "libtvm_runtime_cuda.so"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    directory.mkdir(parents=True, exist_ok=True)
    version = directory / "version"
    version.write_text("libcudart.so.13 { global: *; };")
    for name, pattern, source, options in (
        ("libcuda.so.1", r"\bcu[A-Z]\w+", _DRIVER, []),
        ("libcudart.so.13", r"\bcuda[A-Z]\w+", _RUNTIME, [f"-Wl,--version-script={version}"]),
    ):
        wanted = set(re.findall(pattern, symbols)) - set(re.findall(r"\bcu\w+(?=\()", source))
        stubs = "\n".join(f"int {symbol}(void) {{ return 0; }}" for symbol in sorted(wanted))
        code = directory / f"{name}.c"
        code.write_text(source + stubs)
        command = ["gcc", "-shared", "-fPIC", "-w", f"-Wl,-soname,{name}", *options, "-o", directory / name, code]
        subprocess.run(command, check=True)
    return directory
