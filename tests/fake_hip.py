"""A library in the place of AMD's HIP: a launch calls a function of the test, with what HIP would be given."""

from __future__ import annotations

import ctypes
import subprocess
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

_SOURCE = r"""
#include <stdlib.h>
#include <string.h>
typedef int (*Handler)(const char*, const unsigned*, unsigned, void*, void**);
static Handler handler;
int device, loads, fail_at_load;
void set_handler(Handler h) { handler = h; }
int hipGetDevice(int* index) { *index = device; return 0; }
const char* hipGetErrorString(int status) { return status == 209 ? "no kernel image is available" : "invalid"; }
int hipModuleLoadData(void** module, const void* image) {
  if (memcmp(image, "\177ELF", 4) != 0) return 98;
  *module = (void*)image;
  loads++;
  return fail_at_load;
}
int hipModuleGetFunction(void** kernel, void* module, const char* name) {
  *kernel = strdup(name);
  return module == 0 ? 1 : 0;
}
int hipModuleLaunchKernel(void* kernel, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                          unsigned shared, void* stream, void** arguments, void** extra) {
  const unsigned sizes[6] = {gx, gy, gz, bx, by, bz};
  if (extra != 0 || gx * gy * gz == 0 || bx * by * bz > 256) return 1;
  return handler(kernel, sizes, shared, stream, arguments);
}
"""
# kernel, (grid, block), bytes of local memory that the launch adds, stream, addresses of the arguments
Launched = Callable[[str, list[int], int, int, "ctypes.Array[ctypes.c_void_p]"], None]


def write_library(directory: Path) -> Path:
    """Compile the library."""
    source, library = directory / "fake_hip.c", directory / "libamdhip64.so"
    source.write_text(_SOURCE, encoding="utf-8")
    subprocess.run(["gcc", "-shared", "-fPIC", "-w", "-o", library, source], check=True)
    return library


class FakeHip:
    """The library, loaded."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)
        self.library = ctypes.CDLL(self.path)

    def on_launch(self, launched: Launched) -> None:
        """Call a function for each launch from now on."""
        kind = ctypes.CFUNCTYPE(
            ctypes.c_int,
            ctypes.c_char_p,
            ctypes.POINTER(ctypes.c_uint),
            ctypes.c_uint,
            ctypes.c_void_p,
            ctypes.POINTER(ctypes.c_void_p),
        )

        def handle(kernel: bytes, sizes: list[int], shared: int, stream: int | None, arguments: Any) -> int:
            try:
                launched(kernel.decode(), [sizes[i] for i in range(6)], shared, stream or 0, arguments)
            except BaseException:  # which ctypes would drop
                traceback.print_exc()
                return 999
            return 0

        self._kept = kind(handle)
        self.library.set_handler(self._kept)

    def set(self, name: str, value: int) -> None:
        ctypes.c_int.in_dll(self.library, name).value = value

    def get(self, name: str) -> int:
        return ctypes.c_int.in_dll(self.library, name).value
