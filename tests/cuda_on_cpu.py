"""Runs generated CUDA kernels on the CPU: every CUDA thread is a fiber, and a barrier hands over to the next one.

Checks numbers and the order of shared memory accesses between barriers, on machines without a GPU. Of what a warp can
do on its own there is only its barrier, for kernels of whose threads the first warp alone comes by.
"""

from __future__ import annotations

import ctypes
import re
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

PRELUDE = r"""
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <setjmp.h>
#include <ucontext.h>
#include <vector>
using std::max; using std::min;
typedef unsigned char uchar;
struct Dim { int x, y, z; };
struct float2 { float x, y; };
struct float4 { float x, y, z, w; };
static inline float2 make_float2(float x, float y) { return {x, y}; }
static inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
static Dim threadIdx, blockIdx;
alignas(64) static unsigned char shared_memory[262144];
// where it stopped: unlike swapcontext, going there takes no system call
struct Fiber { ucontext_t start; jmp_buf place; bool begun; };
static jmp_buf scheduler;
static std::vector<Fiber> fibers;
static int running;
static std::vector<char> waiting;  // at a barrier of the block
static void __attribute__((noinline)) pause() { if (_setjmp(fibers[running].place) == 0) _longjmp(scheduler, 1); }
static void __attribute__((noinline)) resume() {
  Fiber& fiber = fibers[running];
  if (_setjmp(scheduler)) return;
  if (fiber.begun) _longjmp(fiber.place, 1);
  fiber.begun = true;
  setcontext(&fiber.start);
}
static void barrier() { waiting[running] = 1; pause(); }
#define __syncthreads() barrier()
#define __syncwarp() pause()
#define CUDART_INF_F INFINITY
#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __restrict__
#define __align__(x)
"""

LAUNCHER = r"""
static void** arguments;
static std::vector<char> done;
static char* stacks;  // of as many threads as a block had; pages that nothing touches take no memory
static int room;
static void enter() { call_kernel(arguments); done[running] = 1; _longjmp(scheduler, 1); }
// Runs the threads of one block in the order of `order` (1 forwards, -1 backwards) between barriers.
extern "C" int run_block(int bx, int by, int bz, int threads, int order, void** a) {
  const size_t stack = 1 << 18;
  if (threads > room) {
    free(stacks);
    stacks = (char*)malloc(stack * (room = threads));
  }
  fibers.assign(threads, Fiber()); done.assign(threads, 0); waiting.assign(threads, 0);
  arguments = a; blockIdx = {bx, by, bz};
  for (int t = 0; t < threads; t++) {
    ucontext_t& start = fibers[t].start;
    getcontext(&start);
    start.uc_stack.ss_sp = stacks + stack * t; start.uc_stack.ss_size = stack;
    makecontext(&start, enter, 0);
  }
  int left = threads, status = 0;
  while (left > 0) {
    int resumed = 0;
    for (int k = 0; k < threads; k++) {
      int t = order > 0 ? k : threads - 1 - k;
      if (done[t] || waiting[t]) continue;
      running = t; threadIdx = {t, 0, 0};
      resume();
      left -= done[t];
      resumed++;
    }
    if (resumed == 0) {  // all that are left wait
      if (left != threads) { status = 1; break; }  // where others have left
      waiting.assign(threads, 0);
    }
  }
  return status;
}
"""


def compile_block(source: str, directory: Path, name: str | None = None) -> tuple[Any, list[str], list[str]]:
    """Compile a kernel of CUDA source for the CPU.

    Returns
    -------
    run_block
        ``run_block(x, y, z, threads, order, pointers)`` of `LAUNCHER`: runs a block on pointers and on addresses of
        numbers; not 0 where threads wait at different barriers.
    names, types
        Of the parameters, names without the ``_ptr`` of pointers.
    """
    kernels = re.findall(r'extern "C" __global__ void [^\n;{]*?(\w+)\(([^)]*)\) \{', source)
    found, signature = next((k for k in kernels if name in (None, k[0])), kernels[0])
    body = source[re.search(rf'extern "C" __global__ void [^\n;{{]*\b{found}\([^)]*\) \{{', source).start() :]  # type: ignore[union-attr]
    body = body.split('extern "C" __global__', 2)
    text = 'extern "C" ' + body[1]
    text = re.sub(r"extern __shared__ __align__\(\d+\) (\w+) (\w+)\[\];", r"\1* \2 = (\1*)shared_memory;", text)
    text = re.sub(r"__shared__ (alignas\(\d+\)) ", r"\1 static ", text)
    parameters = [re.sub(r"__restrict__", "", p).split() for p in signature.split(",")]
    types = [" ".join(p[:-1]) for p in parameters]
    names = [p[-1].removesuffix("_ptr") for p in parameters]
    unpacked = ", ".join(
        f"({kind})a[{i}]" if kind.endswith("*") else f"*({kind}*)a[{i}]" for i, kind in enumerate(types)
    )
    unit = f"{PRELUDE}\n{text}\nstatic void call_kernel(void** a) {{ {found}({unpacked}); }}\n{LAUNCHER}"
    path = directory / f"{found}.cc"
    path.write_text(unit, encoding="utf-8")
    library = path.with_suffix(".so")
    # C++14: what later standards add to the headers takes as long to read as a kernel to compile
    subprocess.run(["g++", "-O1", "-w", "-std=gnu++14", "-shared", "-fPIC", "-o", library, path], check=True)
    return ctypes.CDLL(str(library)).run_block, names, types


def compile_kernel(source: str, directory: Path, name: str) -> Callable[..., None]:
    """Compile a kernel of CUDA source for the CPU.

    Returns
    -------
    callable
        ``run(grid, threads, arguments)``: numbers of blocks (x, y, z); arguments by name, NumPy arrays and integers,
        named as in the source but for the ``_ptr`` of pointers. Threads run in both orders between barriers, on copies,
        and must agree; then in place.
    """
    entry, names, _ = compile_block(source, directory, name)

    def run(grid: Sequence[int], threads: int, arguments: dict[str, Any]) -> None:
        results = []
        for order in (-1, 1):
            copies = {
                # arrays with gaps are inputs, and a copy would have other strides
                key: value.copy() if order < 0 and isinstance(value, np.ndarray) and value.flags.c_contiguous else value
                for key, value in arguments.items()
            }
            holders = [_pointer(copies[key]) for key in names]
            pointers = (ctypes.c_void_p * len(holders))(*(address for address, _ in holders))
            for z, y, x in np.ndindex(*grid[::-1]):
                if entry(x, y, z, threads, order, pointers) != 0:
                    raise RuntimeError(f"{name}: threads of block {(x, y, z)} wait at different barriers")
            results.append(copies)
        for key in names:
            if isinstance(arguments[key], np.ndarray):
                np.testing.assert_array_equal(results[0][key], results[1][key], f"{name}: a race on {key}")

    return run


def _pointer(value: Any) -> tuple[int, Any]:
    if isinstance(value, np.ndarray):
        return value.ctypes.data, value
    holder = ctypes.c_int64(value)
    return ctypes.addressof(holder), holder
