"""Experimental: kernels compile for machines that no preset names, with the schedules for ARM."""

from __future__ import annotations

import re

import pytest
import tvm
from tvm.s_tir import Schedule
from tvm.target import Target

from rpe_tvm.build.workloads import function_of
from rpe_tvm.plan.config import AttentionConfig
from rpe_tvm.schedules import arm
from rpe_tvm.te import shapes

pytestmark = pytest.mark.compile

CONFIG = AttentionConfig(8, 16, 64, "direct", tile=(64, 64), lanes=4)
RISCV = {
    "kind": "llvm",
    "mtriple": "riscv64-linux-gnu",
    "mcpu": "generic-rv64",
    "mattr": ["+m", "+a", "+f", "+d", "+c", "+v"],
    "mabi": "lp64d",
}
WASM = {"kind": "llvm", "mtriple": "wasm32-unknown-unknown-wasm", "mattr": ["+simd128"]}


def compiled(target):
    sch = Schedule(function_of(CONFIG, shapes.symbolic()))
    arm.AARCH64.default(sch, CONFIG)
    function = sch.mod["main"].with_attr("global_symbol", "attention")
    return tvm.compile(tvm.IRModule({"attention": function}), Target(target)).mod


def test_riscv_multiplies_and_adds_in_vectors():
    assembly = compiled(RISCV).inspect_source("asm")
    assert len(re.findall(r"\bvfmacc\.v|\bvfmadd\.v", assembly)) >= 32


def test_wasm(tmp_path):
    module = compiled(WASM)
    assert "f32x4.mul" in module.inspect_source("asm")
    module.write_to_file(str(tmp_path / "code.o"))
    assert (tmp_path / "code.o").read_bytes()[:4] == b"\0asm"
