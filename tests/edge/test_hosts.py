"""The C and C++ programs of a bundle compute the reference, here and on an emulated ARM machine."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from rpe_tvm import reference

sys.path.insert(0, str(Path(__file__).resolve().parent))
from bundles import (
    HEAD_DIM,
    NUM_FEATURES,
    arguments,
    assert_close,
    emulated,
    expected_of,
    needs_qemu,
    page_commands,
    run,
    write_case,
)  # noqa: E402

pytestmark = pytest.mark.compile

CASES = [
    (1, 1, 1, 1, "nprf", False),
    (2, 3, 16, 16, "nprf", False),  # the longest by FFT
    (1, 2, 17, 17, "prf", True),  # the shortest by tiles
    (2, 2, 64, 64, "nprf", True),
    (1, 2, 7, 13, "prf", False),  # cross attention
    (1, 1, 50, 3, "nprf", True),
    (0, 2, 5, 5, "nprf", False),
    (1, 2, 0, 9, "nprf", False),  # no queries
]


def _check(command, tmp_path, batch, heads, n_query, n_key, feature_map, is_causal):
    arrays = arguments(batch, heads, n_query, n_key)
    case = write_case(tmp_path / "case", arrays, feature_map, is_causal)
    done = command(case, tmp_path / "out")
    got = np.fromfile(tmp_path / "out", np.float32).reshape(arrays[0].shape)
    assert_close(got, expected_of(arrays, feature_map, is_causal))
    return done.stdout


@pytest.mark.parametrize("program", ["attention.c", "attention.cpp"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_the_reference(unpacked: Path, programs: Path, tmp_path: Path, program: str, case: tuple) -> None:
    taken = _check(lambda *files: run(programs / program, unpacked, *files), tmp_path, *case)
    assert taken == "x86_64-haswell\n"


@needs_qemu
@pytest.mark.parametrize("program", ["attention.c", "attention.cpp"])
@pytest.mark.parametrize("case", CASES[1:4], ids=str)
def test_equals_the_reference_on_arm(
    unpacked: Path, arm_programs: Path, tmp_path: Path, program: str, case: tuple
) -> None:
    taken = _check(lambda *files: emulated(arm_programs / program, unpacked, *files), tmp_path, *case)
    assert taken == "aarch64-cortex-a72\n"


def _check_block(command, tmp_path):
    batch, heads, n = 2, 3, 21
    random = np.random.default_rng(0)
    x = random.standard_normal((batch, n, heads * HEAD_DIM)).astype(np.float32)
    qkv = random.standard_normal((batch, n, 3, heads, HEAD_DIM)).astype(np.float32)
    rpe_bias = random.standard_normal((heads, 2 * n - 1)).astype(np.float32)
    projection = random.standard_normal((NUM_FEATURES, HEAD_DIM)).astype(np.float32)
    sizes = np.array([batch, heads, n, NUM_FEATURES, HEAD_DIM], np.int64)
    parts = (sizes, x, qkv, rpe_bias, projection)
    (tmp_path / "block").write_bytes(b"".join(part.tobytes() for part in parts))
    command(tmp_path / "block", tmp_path / "out")
    got = np.fromfile(tmp_path / "out", np.float32).reshape(x.shape)
    *_, heads_out = reference.attention(*qkv.transpose(2, 0, 3, 1, 4), rpe_bias, projection)
    summed = x + heads_out.transpose(0, 2, 1, 3).reshape(x.shape)
    centred = summed - summed.mean(-1, keepdims=True)
    assert_close(got, centred / np.sqrt(centred.var(-1, keepdims=True) + 1e-5))


def test_an_encoder_block(unpacked: Path, programs: Path, tmp_path: Path) -> None:
    _check_block(lambda *files: run(programs / "encoder_block", unpacked, *files), tmp_path)


@needs_qemu
def test_an_encoder_block_on_arm(unpacked: Path, arm_programs: Path, tmp_path: Path) -> None:
    _check_block(lambda *files: emulated(arm_programs / "encoder_block", unpacked, *files), tmp_path)


def test_the_self_check(unpacked: Path, programs: Path) -> None:
    out = run(programs / "self_check", unpacked, 1, 16, 63).stdout
    assert out.count(", ok;") == 3 and "x86_64-haswell" in out


def test_the_self_check_finds_wrong_numbers(unpacked: Path, tmp_path: Path) -> None:
    source = (unpacked / "examples" / "self_check.c").read_text()
    (tmp_path / "wrong.c").write_text(source.replace("j - i + n - 1", "i - j + n - 1"))
    sources = [str(path) for path in (unpacked / "src").glob("*.c")]
    command = ["gcc", "-std=c99", "-I", str(unpacked / "include"), str(tmp_path / "wrong.c"), *sources]
    subprocess.run([*command, "-o", str(tmp_path / "wrong"), "-rdynamic", "-ldl", "-lm"], check=True)
    done = run(tmp_path / "wrong", unpacked, 40, check=False)
    assert done.returncode == 1 and "WRONG" in done.stdout


def _commands(holding: str, lengths: str, packed, directory: Path) -> str:
    """Commands of docs/deployment.md for this bundle, which is smaller, in a directory that has it."""
    shutil.copy(packed.path, directory / "bundle.tar.gz")
    commands = page_commands(holding)
    assert "m32-d64" in commands and lengths in commands
    return commands.replace("m32-d64", f"m{NUM_FEATURES}-d{HEAD_DIM}").replace(lengths, "1 16 63")


@pytest.mark.skipif(
    shutil.which("cmake") is None, reason="no cmake: as root, bash scripts/debian_packages.sh installs it"
)
def test_the_commands_for_a_board(packed, tmp_path: Path) -> None:
    commands = _commands("./build/self_check", "1 100 4096", packed, tmp_path)
    out = run("bash", "-euc", f"cd {tmp_path}\n{commands}").stdout
    assert "variant x86_64-haswell" in out and out.count(", ok;") == 3
    (bundle,) = tmp_path.glob("rpe_tvm-*")
    assert run(bundle / "build" / "attention_cpp", check=False).returncode == 2


@needs_qemu
def test_the_commands_for_a_laptop(packed, tmp_path: Path) -> None:
    commands = _commands("qemu-aarch64-static", "1 100", packed, tmp_path)
    out = run("bash", "-euc", f"cd {tmp_path}\n{commands}").stdout
    assert "variant aarch64-cortex-a72" in out and out.count(", ok;") == 3


def test_sizes(packed) -> None:
    for variant in packed.contents.variants:
        for library in variant.libraries:
            assert packed.host_bytes[variant.target] + library.file.size < 200_000
