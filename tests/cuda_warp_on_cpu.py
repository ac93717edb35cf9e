"""Runs CUDA kernels with warp instructions on a CPU: checks numbers, addresses and barriers without a GPU.

The source that TVM generated is compiled as C++. Every thread of a block, or of all blocks of a cluster, is a fibre of
one thread of the CPU; a fibre runs until it meets a barrier. Instructions of a warp (mma.sync, ldmatrix, shuffles)
exchange their operands behind a barrier of the warp. Asynchronous copies, also those to other blocks, happen either at
once or as late as the waits allow: a kernel that is right under both neither reads a tile too early nor overwrites one
that is still in use.
"""

from __future__ import annotations

import ctypes
import itertools
import re
import subprocess
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import tvm
from tvm.target import Target

RUNTIME = r"""
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>
#include <setjmp.h>
#include <ucontext.h>
#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __restrict__
using uchar = unsigned char;
using uint = unsigned int;
using std::max;
using std::min;
struct nv_bfloat16 { uint16_t bits; };
struct half { uint16_t bits; operator float() const { _Float16 x; memcpy(&x, &bits, 2); return (float)x; } };
#define CUDART_INF_F INFINITY
static float rsqrtf(float x) { return 1 / sqrtf(x); }
struct Index { int x, y, z; };
struct Barrier { int threads, arrived, generation; };
struct Copy { void* target; const void* source; size_t bytes; };
struct Fibre {
  ucontext_t start;
  jmp_buf place;  // where it gave way: unlike swapcontext this takes no system call
  bool begun = false;
  int index, rank;
  bool done;
  uint32_t turn = 0;
  int seen = 0;
  std::vector<std::vector<Copy>> groups;  // closed groups of copies, then the open one
};
// addresses of a cluster: the block's rank above 24 bits; as in hardware, a block's own begin at 0 for itself
static const int SHARED = 232448, MOST_BLOCKS = 8, RANK = 1 << 24;
alignas(128) static unsigned char all_shared_memory[MOST_BLOCKS][SHARED];
#define shared_memory (all_shared_memory[self->rank])
static std::vector<Fibre> fibres;
static std::vector<Barrier> warps, blocks;
static Barrier cluster;
static std::vector<int> begun, ended;  // threads of every block
static int progress;  // of all threads: changes where one that waits may go on
static Fibre* self;
static Index first_block;
static bool copies_late;
#define threadIdx (Index{self->index, 0, 0})
#define blockIdx (Index{first_block.x + self->rank, first_block.y, first_block.z})

static void fail(const char* message) { fprintf(stderr, "%s\n", message); abort(); }
static jmp_buf scheduler;
static void __attribute__((noinline)) give_way() {
  Fibre* me = self;
  if (_setjmp(me->place) == 0) _longjmp(scheduler, 1);
  self = me;
}
static void __attribute__((noinline)) resume() {
  if (_setjmp(scheduler)) return;
  if (self->begun) _longjmp(self->place, 1);
  self->begun = true;
  setcontext(&self->start);
}
static void meet(Barrier& barrier) {
  int generation = barrier.generation;
  if (++barrier.arrived == barrier.threads) { barrier.arrived = 0; barrier.generation++; progress++; return; }
  while (barrier.generation == generation) give_way();
}
static void __syncthreads() { meet(blocks[self->rank]); }
static void __syncwarp() { meet(warps[self->rank * 32 + self->index / 32]); }
static void cluster_arrive() {
  self->seen = cluster.generation;
  if (++cluster.arrived == cluster.threads) { cluster.arrived = 0; cluster.generation++; progress++; }
}
static void cluster_wait() { while (cluster.generation == self->seen) give_way(); }
static uint32_t __cvta_generic_to_shared(void* p) { return (uint32_t)((unsigned char*)p - shared_memory); }
static unsigned char* at_rank(int rank, uint32_t address, uint32_t bytes) {
  if (address + bytes > SHARED || address % bytes) fail("address in shared memory out of range or not aligned");
  return all_shared_memory[rank] + address;
}
static unsigned char* at_shared(uint32_t address, uint32_t bytes) { return at_rank(self->rank, address, bytes); }
static uint32_t in_block(uint32_t address, uint32_t rank) { return address + (rank + 1) * RANK; }
// arrivals count bytes; what is sent to another block comes at once or when all else waits for it
struct Sent { int from, to; unsigned char *target, *source; uint32_t size; void* arrival; };
struct Arrival { int32_t made, missing; };
static std::vector<Sent> on_the_way;
static void deliver(const Sent& sent) {
  progress++;
  for (int rank : {sent.from, sent.to}) {
    if (begun[rank] == 0 || ended[rank] == blocks[rank].threads) fail("a block of a copy does not run");
  }
  memcpy(sent.target, sent.source, sent.size);
  Arrival arrival;
  memcpy(&arrival, sent.arrival, 8);
  arrival.missing -= sent.size;
  memcpy(sent.arrival, &arrival, 8);
}
static void send(uint32_t target, uint32_t source, uint32_t size, uint32_t arrival) {
  int rank = target / RANK - 1;
  if (rank < 0 || rank >= blocks.size() || arrival / RANK - 1 != rank) fail("no addresses of one block of the cluster");
  target %= RANK, arrival %= RANK;
  if (size % 16) fail("no whole pieces of 16 bytes");
  at_rank(rank, target + size - 16, 16), at_shared(source + size - 16, 16);
  Sent sent{self->rank, rank, at_rank(rank, target, 16), at_shared(source, 16), size, at_rank(rank, arrival, 8)};
  if (copies_late) on_the_way.push_back(sent);
  else deliver(sent);
}
static void expect(uint32_t address, int32_t size) {
  Arrival arrival{1, size};
  memcpy(at_shared(address, 8), &arrival, 8);
}
static uint32_t test_wait(uint32_t address) {
  Arrival arrival;
  memcpy(&arrival, at_shared(address, 8), 8);
  if (arrival.made != 1) fail("nothing is expected here");
  if (arrival.missing == 0) return 1;
  for (auto& sent : on_the_way) deliver(sent);
  on_the_way.clear();
  give_way();
  return 0;
}

// what the lanes of a warp show each other: two places in turn, so that one barrier is enough
static uint32_t shown[2][MOST_BLOCKS * 32][32][16];
static uint32_t (*show(std::initializer_list<uint32_t> words))[16] {
  int warp = self->rank * 32 + self->index / 32;
  auto& place = shown[self->turn++ % 2][warp];
  int at = 0;
  for (uint32_t word : words) place[self->index % 32][at++] = word;
  meet(warps[warp]);
  return place;
}
static uint32_t bits(float x) { uint32_t u; memcpy(&u, &x, 4); return u; }
static float real(uint32_t u) { float x; memcpy(&x, &u, 4); return x; }
static float from_bf16(uint32_t u) { return real(u << 16); }
static uint32_t to_bf16(float x) {
  if (x != x) return 0x7fff;
  uint32_t u = bits(x);
  return (u + 0x7fff + (u >> 16 & 1)) >> 16;
}
static float from_f16(uint32_t u) { _Float16 h; uint16_t s = u; memcpy(&h, &s, 2); return (float)h; }
static uint32_t to_f16(float x) { _Float16 h = (_Float16)x; uint16_t s; memcpy(&s, &h, 2); return s; }

template <float (*from)(uint32_t)>
static void mma(float& d0, float& d1, float& d2, float& d3, uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3,
                uint32_t b0, uint32_t b1, float c0, float c1, float c2, float c3) {
  auto lanes = show({a0, a1, a2, a3, b0, b1});
  int lane = self->index % 32;
  float* d[4] = {&d0, &d1, &d2, &d3};
  float c[4] = {c0, c1, c2, c3};
  for (int i = 0; i < 4; i++) {
    double sum = 0;
    int group = lane / 4, column = 2 * (lane % 4) + i % 2;
    for (int k = 0; k < 16; k++) {
      uint32_t a = lanes[group * 4 + k % 8 / 2][i / 2 + k / 8 * 2] >> 16 * (k % 2) & 0xffff;
      uint32_t b = lanes[column * 4 + k % 8 / 2][4 + k / 8] >> 16 * (k % 2) & 0xffff;
      sum += (double)from(a) * from(b);
    }
    *d[i] = (float)(c[i] + sum);
  }
}
static void ldmatrix_x4(bool transpose, uint32_t& r0, uint32_t& r1, uint32_t& r2, uint32_t& r3, uint32_t address) {
  auto lanes = show({address});
  int lane = self->index % 32;
  uint32_t* r[4] = {&r0, &r1, &r2, &r3};
  for (int matrix = 0; matrix < 4; matrix++) {
    uint16_t element[2];
    for (int i = 0; i < 2; i++) {
      int row = transpose ? 2 * (lane % 4) + i : lane / 4, column = transpose ? lane / 4 : 2 * (lane % 4) + i;
      memcpy(&element[i], at_shared(lanes[matrix * 8 + row][0], 16) + 2 * column, 2);
    }
    *r[matrix] = element[0] | (uint32_t)element[1] << 16;
  }
}
static float __shfl_xor_sync(uint32_t, float x, int mask, int) {
  auto lanes = show({bits(x)});
  return real(lanes[self->index % 32 ^ mask][0]);
}
static void copy_now(const Copy& copy) {
  if (copy.source) memcpy(copy.target, copy.source, copy.bytes); else memset(copy.target, 0, copy.bytes);
}
template <size_t bytes>
static void copy_async(uint32_t target, const void* source, bool ignore = false) {
  if (!ignore && (uintptr_t)source % bytes) fail("address in global memory not aligned");
  Copy copy{at_shared(target, bytes), ignore ? nullptr : source, bytes};
  if (!copies_late) copy_now(copy);
  else self->groups.back().push_back(copy);
}
static void commit_group() { self->groups.emplace_back(); }
static void wait_group(size_t pending) {
  while (self->groups.size() > pending + 1) {
    for (auto& copy : self->groups.front()) copy_now(copy);
    self->groups.erase(self->groups.begin());
  }
}
"""

LAUNCHER = r"""
static const uint64_t* arguments;
static void run_thread() {
  begun[self->rank]++;
  CALL;
  ended[self->rank]++;
  progress++;
  self->done = true;
  _longjmp(scheduler, 1);
}
extern "C" void launch(const uint64_t* given, const int* grid, int threads, int size, bool late, bool backwards) {
  arguments = given;
  copies_late = late;
  const size_t STACK = 1 << 18;
  const int all = size * threads;
  char* stacks = (char*)malloc(STACK * all);  // pages that nothing touches take no memory
  for (int z = 0; z < grid[2]; z++) for (int y = 0; y < grid[1]; y++) for (int x = 0; x < grid[0]; x += size) {
    first_block = {x, y, z};
    memset(all_shared_memory, 0xff, size * SHARED);  // NaN
    fibres.assign(all, Fibre{});
    warps.assign(size * 32, Barrier{32, 0, 0});
    blocks.assign(size, Barrier{threads, 0, 0});
    cluster = Barrier{all, 0, 0};
    begun.assign(size, 0);
    ended.assign(size, 0);
    for (int t = 0; t < all; t++) {
      Fibre& fibre = fibres[t];
      fibre.index = t % threads;
      fibre.rank = t / threads;
      fibre.groups.resize(1);
      getcontext(&fibre.start);
      fibre.start.uc_stack.ss_sp = stacks + STACK * t;
      fibre.start.uc_stack.ss_size = STACK;
      makecontext(&fibre.start, run_thread, 0);
    }
    // a block runs as far as it can before the next one does
    for (bool any = true; any;) {
      any = false;
      for (int block = 0; block < size; block++) {
        for (int before = progress - 1; before != progress;) {
          before = progress;
          for (int t = block * threads; t < (block + 1) * threads; t++) {
            self = &fibres[backwards ? all - 1 - t : t];
            if (self->done) continue;
            any = true;
            resume();
          }
        }
      }
    }
  }
  free(stacks);
}
"""

# Text of an instruction -> the call that stands for it, with the names of the helper function's parameters.
INSTRUCTIONS = (
    (r"mma\.sync\.aligned\.m16n8k16\.row\.col\.f32\.bf16\.bf16\.f32 ", "mma<from_bf16>({parameters})"),
    (r"mma\.sync\.aligned\.m16n8k16\.row\.col\.f32\.f16\.f16\.f32 ", "mma<from_f16>({parameters})"),
    (r"ldmatrix\.sync\.aligned\.m8n8\.x4\.shared\.b16 .*\[%4\+?(-?\d*)\]", "ldmatrix_x4(false, {parameters} + {0})"),
    (
        r"ldmatrix\.sync\.aligned\.m8n8\.x4\.trans\.shared\.b16 .*\[%4\+?(-?\d*)\]",
        "ldmatrix_x4(true, {parameters} + {0})",
    ),
    (r"cp\.async\.cg\.shared\.global ", "copy_async<16>({parameters})"),
    (r"cp\.async\.ca\.shared\.global \[%0\], \[%1\], 4", "copy_async<4>({parameters})"),
    (r"cp\.async\.commit_group", "commit_group()"),
    (r"cp\.async\.wait_group (\d+)", "wait_group({0})"),
    (r"ld\.shared\.f32 .*\[%1\+?(-?\d*)\]", "memcpy(&{names[0]}, at_shared({names[1]} + {0}, 4), 4)"),
    (
        r"ld\.shared\.v2\.f32 .*\[%2\+?(-?\d*)\]",
        "memcpy(&{names[0]}, at_shared({names[2]} + {0}, 8), 4);"
        "memcpy(&{names[1]}, at_shared({names[2]} + {0}, 8) + 4, 4)",
    ),
    (
        r"ld\.shared\.v4\.f32 .*\[%4\+?(-?\d*)\]",
        "unsigned char* from = at_shared({names[4]} + {0}, 16);"
        "memcpy(&{names[0]}, from, 4); memcpy(&{names[1]}, from + 4, 4);"
        "memcpy(&{names[2]}, from + 8, 4); memcpy(&{names[3]}, from + 12, 4)",
    ),
    (
        r"st\.shared\.v4\.f32 \[%0\+?(-?\d*)\]",
        "float four[] = {{ {names[1]}, {names[2]}, {names[3]}, {names[4]} }};"
        "memcpy(at_shared({names[0]} + {0}, 16), four, 16)",
    ),
    (
        r"st\.global\.v4\.f32 \[%0\]",
        'if ((uintptr_t){names[0]} % 16) fail("address in global memory not aligned");'
        "float four[] = {{ {names[1]}, {names[2]}, {names[3]}, {names[4]} }}; memcpy((void*){names[0]}, four, 16)",
    ),
    (r"red\.global\.add\.f32 ", "*(float*){names[0]} += {names[1]}"),
    (r"st\.shared\.f32 \[%0\+?(-?\d*)\]", "memcpy(at_shared({names[0]} + {0}, 4), &{names[1]}, 4)"),
    (r"st\.shared\.u32 \[%0\+?(-?\d*)\]", "memcpy(at_shared({names[0]} + {0}, 4), &{names[1]}, 4)"),
    (r"mov\.u32 %0, %%cluster_ctarank", "return self->rank"),
    (r"mapa\.shared::cluster\.u32 ", "{names[0]} = in_block({names[1]}, {names[2]})"),
    (
        r"st\.shared\.v[24]\.u32 \[%0\+?(-?\d*)\]",
        "uint32_t words[] = {{{others}}}; memcpy(at_shared({names[0]} + {0}, sizeof(words)), words, sizeof(words))",
    ),
    (r"cp\.async\.bulk\.shared::cluster\.shared::cta\.mbarrier::complete_tx::bytes ", "send({parameters})"),
    (r"fence\.", ""),
    (r"griddepcontrol\.", ""),
    (r"mbarrier\.init\.shared\.b64 \[%0\+?(-?\d*)\]", "expect({names[0]} + {0}, 0)"),
    (r"mbarrier\.arrive\.expect_tx\.shared\.b64 _, \[%0\+?(-?\d*)\]", "expect({names[0]} + {0}, {names[1]})"),
    (
        r".*mbarrier\.try_wait\.parity\.acquire\.cluster\.shared\.b64 pd0, \[%1\+?(-?\d*)\]",
        "{names[0]} = test_wait({names[1]} + {0})",
    ),
    (r"barrier\.cluster\.arrive\.relaxed\.aligned", "cluster_arrive()"),
    (r"barrier\.cluster\.wait\.acquire\.aligned", "cluster_wait()"),
    (r"ex2\.approx\.ftz\.f32 ", "{names[0]} = exp2f({names[1]})"),
    (r"ld\.global\.nc\.u32 ", "memcpy(&{names[0]}, {names[1]}, 4)"),
    (r"st\.global\.u32 ", "memcpy((void*){names[0]}, &{names[1]}, 4)"),
    (r"cvt\.rn\.bf16x2\.f32 ", "{names[0]} = to_bf16({names[1]}) << 16 | to_bf16({names[2]})"),
    (r"cvt\.rn\.f16x2\.f32 ", "{names[0]} = to_f16({names[1]}) << 16 | to_f16({names[2]})"),
)
_PREDICATE = "{ .reg .pred ps0; setp.ne.b32 ps0, %2, 0; "
_RESULT = "{ .reg .pred pd0; "
_KERNEL = re.compile(r'extern "C" __global__ void __launch_bounds__\((\d+)[, \d]*\) (\w+)\((.*?)\) \{')
_HELPER = re.compile(r"__forceinline__ __device__ (\w[\w ]*)\s+(tvm_builtin_\w+)\(([^)]*)\)\s*\{(.*?)\n\}", re.S)


class Kernel:
    """A kernel of a compiled function, to be run block by block.

    Parameters
    ----------
    function : tvm.tirx.PrimFunc
        Scheduled for CUDA, with exactly one kernel.
    folder : pathlib.Path
        Where the C++ source and library are put.
    """

    def __init__(self, function: tvm.tirx.PrimFunc, folder: Path) -> None:
        # common subexpressions would be computed on the host and become arguments without a meaning of their own
        with tvm.transform.PassContext(config={"tirx.disable_cse_tir": True}):
            target = Target({"kind": "cuda", "arch": "sm_90"}, host={"kind": "llvm"})
            name = str(function.attrs["global_symbol"])
            executable = tvm.compile(tvm.IRModule({name: function}), target)
        self.cuda = str(executable.mod.imports[0].inspect_source())
        helpers = "\n".join(self._helper(*each.groups()) for each in _HELPER.finditer(self.cuda))
        ((threads, kernel, signature),) = _KERNEL.findall(self.cuda)
        self.threads, parameters = int(threads), signature.split(", ")
        self.parameters = [parameter.rsplit(" ", 1)[1] for parameter in parameters]
        body = self.cuda[self.cuda.index(f"{kernel}({signature}) {{") :]
        body = re.sub(r"extern __shared__ \S+ uchar (\w+)\[\];", r"unsigned char* \1 = shared_memory;", body)
        body = re.sub(r"__shared__ (alignas\(\d+\)) ", r"\1 static ", body)
        casts = [
            f"({parameter.rsplit(' ', 1)[0].replace('__restrict__', '')})arguments[{i}]"
            for i, parameter in enumerate(parameters)
        ]
        launcher = LAUNCHER.replace("CALL", f"{kernel}({', '.join(casts)})")
        source, library = folder / f"{kernel}.cc", folder / f"{kernel}.so"
        # of a kernel on tensor cores the products are `RUNTIME`'s: to optimise the rest takes longer than it saves
        level = 0 if "mma.sync" in self.cuda else 1
        code = f"#pragma GCC optimize({level})\n{helpers}\nstatic void {body}"
        code = f"#pragma GCC push_options\n{code}\n#pragma GCC pop_options"
        source.write_text(f"{RUNTIME}\n{code}\n{launcher}")
        subprocess.run(
            ["g++", "-std=gnu++14", "-O1", "-fno-strict-aliasing", "-w", "-shared", "-fPIC", "-o", library, source],
            check=True,
        )
        self._launch = ctypes.CDLL(str(library)).launch

    @staticmethod
    def _helper(result: str, name: str, parameters: str, body: str) -> str:
        names = [parameter.rsplit(" ", 1)[1] for parameter in parameters.split(", ") if parameter]
        if "asm" in body:
            (text,) = re.findall(r'asm(?: volatile)?\("(.*?);', body.replace(_PREDICATE, "").replace(_RESULT, ""))
            for pattern, call in INSTRUCTIONS:
                match = re.match(pattern, text)
                if match:
                    numbers = [number or "0" for number in match.groups()]
                    given = dict(names=names, parameters=", ".join(names), others=", ".join(names[1:]))
                    body = call.format(*numbers, **given) + ";"
                    break
            else:
                raise NotImplementedError(f"no C++ for the instruction {text}")
        return f"static {result} {name}({parameters}) {{ {body} }}"

    def __call__(
        self,
        grid: tuple[int, int, int],
        arguments: Mapping[str, np.ndarray | int],
        late: bool,
        backwards: bool,
        cluster: int = 1,
    ) -> None:
        """Run all blocks of the grid, `cluster` of them along x at the same time.

        Arrays are arguments `<name>_ptr`, numbers are called by their name.
        """
        values = []
        for name in self.parameters:
            value = arguments[name.removesuffix("_ptr")]
            values.append(value.ctypes.data if isinstance(value, np.ndarray) else value)
        self._launch(
            (ctypes.c_uint64 * len(values))(*(value % 2**64 for value in values)),
            (ctypes.c_int * 3)(*grid),
            self.threads,
            cluster,
            ctypes.c_bool(late),
            ctypes.c_bool(backwards),
        )


ORDERS = tuple(itertools.product((False, True), repeat=2))


def to_bits(x: np.ndarray, dtype: str) -> np.ndarray:
    """Round to float16 or bfloat16, and return the bits as uint16."""
    if dtype == "float16":
        return x.astype(np.float16).view(np.uint16)
    bits = np.ascontiguousarray(x, dtype=np.float32).view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def from_bits(bits: np.ndarray, dtype: str) -> np.ndarray:
    """Return the numbers that `to_bits` rounded to."""
    if dtype == "float16":
        return bits.view(np.float16).astype(np.float64)
    return (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
