"""Who may import whom, and how much an import costs."""

from __future__ import annotations

import ast
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "rpe_tvm"

# Layer -> the layers that its modules may import. Imports point downwards only.
BELOW = {
    "": set(),  # rpe_tvm/__init__.py
    "errors": set(),
    "files": {"errors"},
    "machine": set(),
    "reference": {"errors"},
    "plan": {"errors"},
    "runtime": {"errors", "machine", "plan"},
    "llvm": set(),
    "target_spec": {"machine"},
    "gpu_targets": {"errors", "plan"},
    "arm_targets": {"errors", "llvm", "machine", "target_spec"},
    "rocm_targets": {"errors", "gpu_targets", "plan"},
    "targets": {"errors", "llvm", "machine", "target_spec", "arm_targets", "gpu_targets", "rocm_targets"},
    "te": {"errors", "plan"},
    "schedules": {"errors", "plan", "te"},
    "build": {"errors", "files", "machine", "plan", "te", "schedules", "gpu_targets", "targets", "runtime"},
    "tune": {
        *("errors", "files", "plan", "te", "schedules", "gpu_targets", "targets", "build", "runtime", "reference"),
        *("machine", "bench_problem", "bench_cuda_clock", "bench_cuda_machine", "bench_cuda_reference"),
    },
    "edge": {"errors", "plan", "reference", "machine", "target_spec", "targets", "runtime"},
    "torch": {"errors", "plan", "runtime"},
    "peers": {"errors", "reference"},
    "bench_turns": {"errors"},
    "bench_machine": set(),
    "bench_output": {"bench_machine"},
    "bench_problem": {"reference"},
    "bench_peers": {"bench_machine", "bench_problem"},
    "bench": {"errors", "bench_turns", "bench_machine", "bench_output", "bench_problem", "bench_peers"},
    "bench_cuda_clock": {"bench_turns"},
    "bench_cuda_machine": {"bench_machine"},
    "bench_cuda_reference": {"bench_problem"},
    "bench_cuda_rows": {"bench_output", "bench_peers"},
    "bench_cuda": {
        *("errors", "bench_turns", "bench_output", "bench_problem", "bench_peers"),
        *("bench_cuda_clock", "bench_cuda_machine", "bench_cuda_reference", "bench_cuda_rows"),
    },
    "bench_toeplitz": {"errors", "bench_turns", "bench_machine", "bench_output"},
    "bench_cuda_toeplitz": {"errors", "bench_turns", "bench_output", "bench_cuda_clock", "bench_cuda_machine"},
    "bench_train_steps": set(),
    "bench_train_reference": {"errors", "reference", "bench_machine", "bench_train_steps"},
    "bench_train_memory": {"errors", "bench_machine", "bench_train_steps"},
    "bench_train": {
        *("errors", "bench_turns", "bench_machine", "bench_output"),
        *("bench_train_steps", "bench_train_reference", "bench_train_memory"),
    },
    "bench_cuda_train": {
        *("errors", "bench_turns", "bench_output", "bench_cuda_clock", "bench_cuda_machine"),
        *("bench_train", "bench_train_steps", "bench_train_reference"),
    },
    "cli": {
        *("errors", "arm_targets", "bench", "bench_toeplitz", "bench_train"),
        *("bench_cuda", "bench_cuda_toeplitz", "bench_cuda_train"),
    },
    "__main__": {"cli"},
}
# Layer -> what a function may import besides, when it runs: compiling on demand, and the commands of the
# command line.
ON_DEMAND = {
    "gpu_targets": {"runtime"},
    "targets": {"runtime"},
    "edge": {"build"},
    "torch": {"build", "targets"},
    "tune": {"torch"},
    "bench_problem": {"torch"},
    "bench_peers": {"peers"},
    "bench_toeplitz": {"peers", "torch"},
    "bench_cuda_toeplitz": {"peers", "torch"},
    "bench_train_steps": {"peers", "torch"},
    "bench_train_reference": {"peers"},
    "cli": {"build", "edge", "gpu_targets", "plan", "runtime", "targets", "torch", "tune"},
}
BENCHMARKS = {
    *("bench", "bench_problem", "bench_peers", "bench_toeplitz", "bench_turns"),
    *("bench_cuda", "bench_cuda_clock", "bench_cuda_machine", "bench_cuda_reference", "bench_cuda_toeplitz"),
    *("bench_train", "bench_train_steps", "bench_train_reference", "bench_train_memory", "bench_cuda_train"),
}
# Heavy package -> the layers that may import it, and those that may when a function runs.
HEAVY = {
    "tvm": (
        {"te", "schedules", "build", "tune"},
        {"arm_targets", "edge", "gpu_targets", "llvm", "rocm_targets", "targets"},
    ),
    "tvm_ffi": ({"te", "schedules", "build", "tune", "runtime"}, {"llvm"}),
    "torch": ({"torch", "peers"}, {"tune", *BENCHMARKS}),
    "matplotlib": (set(), {"bench_output"}),
    "xgboost": (set(), {"tune"}),
}


@dataclass(frozen=True)
class Import:
    """One imported module: in which layer, at which place, and whether only when a function runs."""

    layer: str
    place: str
    module: str
    is_lazy: bool


def _layer(parts: tuple[str, ...]) -> str:
    return parts[0].removesuffix(".py").replace("__init__", "")


def _imports() -> Iterator[Import]:
    for path in sorted(PACKAGE.rglob("*.py")):
        relative = path.relative_to(PACKAGE)
        if relative.parts[0] == "tuning_logs":
            continue
        for node, is_lazy in _walk(ast.parse(path.read_text(encoding="utf-8")), False):
            place = f"rpe_tvm/{relative}:{node.lineno}"
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            else:
                assert node.level == 0 and node.module, f"{place}: relative import"
                names = [node.module]
                if node.module == "rpe_tvm":
                    names = [f"rpe_tvm.{alias.name}" for alias in node.names]
            for name in names:
                yield Import(_layer(relative.parts), place, name, is_lazy)


def _walk(node: ast.AST, is_lazy: bool) -> Iterator[tuple[ast.Import | ast.ImportFrom, bool]]:
    if isinstance(node, ast.Import | ast.ImportFrom):
        yield node, is_lazy
    if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
        return  # never runs
    inside = is_lazy or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
    for child in ast.iter_child_nodes(node):
        yield from _walk(child, inside)


def test_imports_point_downwards() -> None:
    wrong = []
    for each in _imports():
        first, _, rest = each.module.partition(".")
        if first != "rpe_tvm":
            continue
        other = rest.partition(".")[0]
        if other in ("", "__version__", each.layer):
            continue
        allowed = BELOW[each.layer] | (ON_DEMAND.get(each.layer, set()) if each.is_lazy else set())
        if other not in allowed:
            wrong.append(f"{each.place}: {each.layer or 'rpe_tvm'} imports {other}")
    assert wrong == []


def test_heavy_packages_stay_where_they_belong() -> None:
    wrong = []
    for each in _imports():
        package = each.module.partition(".")[0]
        if package in HEAVY:
            always, on_demand = HEAVY[package]
            if each.layer not in (always | on_demand if each.is_lazy else always):
                wrong.append(f"{each.place}: {each.layer or 'rpe_tvm'} imports {package}")
    assert wrong == []


def test_import_is_quick_and_light(run_python: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    code = (
        "import sys, time\nstart = time.perf_counter()\nimport rpe_tvm\nprint(time.perf_counter() - start)\n"
        "assert not {'tvm', 'tvm_ffi', 'torch', 'numpy'} & set(sys.modules)"
    )
    assert min(float(run_python(code).stdout) for _ in range(3)) < 0.2


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("rpe_tvm.errors", {"numpy", "tvm", "tvm_ffi", "torch"}),
        ("rpe_tvm.reference", {"tvm", "tvm_ffi", "torch"}),
        ("rpe_tvm.plan.wisdom", {"tvm", "tvm_ffi", "torch"}),
        ("rpe_tvm.plan.twiddles", {"tvm", "tvm_ffi", "torch"}),
        ("rpe_tvm.cli", {"tvm", "tvm_ffi", "torch"}),
        ("rpe_tvm.build", {"tvm", "torch"}),
        ("rpe_tvm.runtime", {"tvm"}),  # tvm_ffi imports torch by itself
        ("rpe_tvm.edge", {"tvm"}),
        ("rpe_tvm.torch", {"tvm"}),
        ("rpe_tvm.tune.gpu_cli", {"tvm"}),  # races run where there is none
    ],
)
def test_what_an_import_leaves_out(
    run_python: Callable[..., subprocess.CompletedProcess[str]], module: str, absent: set[str]
) -> None:
    run_python(f"import sys, {module}\nassert not {absent} & set(sys.modules), {absent} & set(sys.modules)")
