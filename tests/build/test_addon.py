"""The hooks that are linked into every library: OpenMP loops and the workspace pool."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from rpe_tvm.build import link

Run = Callable[..., subprocess.CompletedProcess[str]]

# Rows of `width` values through a workspace of that size, parallel over rows; refuses values below zero.
_ROWS = """
@I.ir_module
class Module:
    @T.prim_func(s_tir=True)
    def rows(x_: T.handle, y_: T.handle):
        T.func_attr({"global_symbol": "rows", "tirx.noalias": True})
        n = T.int64()
        x = T.match_buffer(x_, (n, WIDTH), "float32", align=4)
        y = T.match_buffer(y_, (n, WIDTH), "float32", align=4)
        for i in T.parallel(n):
            with T.sblock("row"):
                vi = T.axis.spatial(n, i)
                T.reads(x[vi, 0:WIDTH])
                T.writes(y[vi, 0:WIDTH])
                assert x[vi, 0] >= T.float32(0), "a value below zero"
                double = T.sblock_alloc_buffer((WIDTH,), "float32")
                for j in range(WIDTH):
                    double[j] = x[vi, j] + x[vi, j]
                for j in range(WIDTH):
                    y[vi, j] = double[WIDTH - 1 - j]
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import tvm

    from rpe_tvm import targets
    from rpe_tvm.build import compile as build

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RPE_TVM_CACHE", str(tmp_path_factory.mktemp("cache")))
        module = tvm.script.from_source(_ROWS.replace("WIDTH", "131072"))
        return build.compile_module(module, "rows", {}, targets.preset("haswell"), op="rows") / "lib.so"


# Counts the threads that a call adds. sys.argv[1] is the library.
_CALL = """
import os, sys
import numpy as np
import tvm_ffi
rows = tvm_ffi.load_module(sys.argv[1])["rows"]
def call(n=8):
    x = np.arange(n * 131072, dtype=np.float32).reshape(n, 131072)
    y = np.empty_like(x)
    rows(x, y)
    assert (y == 2 * x[:, ::-1]).all()
def threads():
    return len(os.listdir("/proc/self/task"))
"""


def test_hooks_by_themselves(tmp_path: Path) -> None:
    program = tmp_path / "addon_test"
    source = Path(__file__).with_name("addon_test.cc")
    flags = ["-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", "-fopenmp", f'-DADDON="{link.ADDON}"']
    subprocess.run([*link.find_compiler(), *flags, str(source), "-o", str(program)], check=True)
    done = subprocess.run([str(program)], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr


def test_hooks_are_hidden_and_nothing_of_libtvm_runtime_is_needed(library: Path) -> None:
    symbols = subprocess.run(["nm", "-D", str(library)], capture_output=True, text=True, check=True).stdout
    assert "__tvm_ffi_rows" in symbols
    assert "TVMBackend" not in symbols
    needed = subprocess.run(["readelf", "-d", str(library)], capture_output=True, text=True, check=True).stdout
    assert "libtvm" not in needed


@pytest.mark.parametrize("other", ["", "import tvm"])
def test_loops_run_on_openmp_whatever_else_is_imported(library: Path, run_python: Run, other: str) -> None:
    # TVM's own pool would be of one thread here.
    code = (
        f"import sys\nsys.modules['torch'] = None\n{other}\n{_CALL}\n"
        "before = threads(); call(); print(threads() - before)"
    )
    done = run_python(code, str(library), OMP_NUM_THREADS="3", TVM_NUM_THREADS="1")
    assert done.stdout.split() == ["2"]


def test_the_thread_count_follows_torch(library: Path, run_python: Run) -> None:
    code = (
        f"import torch\n{_CALL}\n"
        "torch.set_num_threads(1); before = threads(); call(); one = threads()\n"
        "torch.set_num_threads(4); call(); print(one - before, threads() - before)\n"
        "maps = open('/proc/self/maps').read().split()\n"
        "print(len({word for word in maps if 'libgomp' in word}))"
    )
    assert run_python(code, str(library)).stdout.split() == ["0", "3", "1"]


def test_an_error_in_any_thread_reaches_the_caller(library: Path) -> None:
    import numpy as np
    import tvm_ffi

    rows = tvm_ffi.load_module(str(library))["rows"]
    for bad in range(4):
        x = np.zeros((4, 131072), np.float32)
        x[bad] = -1
        with pytest.raises(Exception, match="a value below zero"):
            rows(x, np.empty_like(x))
    x[:] = 1
    y = np.empty_like(x)
    rows(x, y)
    assert (y == 2).all()


def test_repeated_calls_and_short_threads_do_not_grow_memory(library: Path, run_python: Run) -> None:
    code = f"""
import sys, threading
sys.modules["torch"] = None
{_CALL}
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096
def on_threads():
    for _ in range(10):
        threads_ = [threading.Thread(target=call, args=(2,)) for _ in range(2)]
        for each in threads_: each.start()
        for each in threads_: each.join()
for n in range(1, 9): call(n)
on_threads()
before = resident()
for _ in range(8):
    for n in range(1, 9): call(n)
on_threads()
print(resident() - before)
"""
    done = run_python(code, str(library), OMP_NUM_THREADS="2")
    assert int(done.stdout) < 16 << 20
