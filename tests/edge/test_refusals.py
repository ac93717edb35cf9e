"""What is refused, with the reason, from C, from C++ and from `rpe-tvm verify`."""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from rpe_tvm.cli import main
from rpe_tvm.edge import contents

sys.path.insert(0, str(Path(__file__).resolve().parent))
from bundles import arguments, edit, emulated, needs_qemu, replace_library, run, write_case  # noqa: E402

pytestmark = pytest.mark.compile

LIBRARY = "kernels/attention-m3-d6-n64/x86_64-haswell/lib.so"


def _replace(file: Path, content: bytes) -> None:
    file.unlink()
    file.write_bytes(content)


def _truncate(bundle: Path) -> None:
    _replace(bundle / LIBRARY, (bundle / LIBRARY).read_bytes()[:5000])


def _tamper(bundle: Path) -> None:
    content = bytearray((bundle / LIBRARY).read_bytes())
    content[len(content) // 2] ^= 1
    _replace(bundle / LIBRARY, bytes(content))


def _tamper_tables(bundle: Path) -> None:
    path = bundle / "kernels/attention-m3-d6-n16/x86_64-haswell/tables.bin"
    content = bytearray(path.read_bytes())
    content[0] ^= 1
    _replace(path, bytes(content))


def _remove(bundle: Path) -> None:
    (bundle / LIBRARY).unlink()


def _tamper_manifest(bundle: Path) -> None:
    text = (bundle / contents.FILE).read_text()
    (bundle / contents.FILE).write_text(text.replace("operator attention 3 6", "operator attention 3 7"))


def _truncate_manifest(bundle: Path) -> None:
    text = (bundle / contents.FILE).read_text()
    (bundle / contents.FILE).write_text(text[: len(text) // 2])


def _no_bundle(bundle: Path) -> None:
    shutil.rmtree(bundle)
    bundle.mkdir()


def _edited(old: str, new: str) -> Callable[[Path], None]:
    return lambda bundle: edit(bundle, lambda text: text.replace(old, new))


def _without_libgomp(bundle: Path) -> None:
    replace_library(bundle, lambda code: code.replace(b"libgomp.so.1\0", b"libgomp.so.9\0"))


def _needs_a_new_glibc(bundle: Path) -> None:
    edit(bundle, lambda text: text.replace(" x86_64 2.", " x86_64 9."))


# What happened -> how to do it, what C and C++ say, what verify says.
REFUSALS = {
    "truncated": (_truncate, "altered or truncated: expected", "altered or truncated"),
    "tampered": (_tamper, "was altered: expected SHA-256", "altered or truncated"),
    "tampered tables": (_tamper_tables, "tables.bin was altered", "tables.bin was altered"),
    "missing file": (_remove, "No such file", "lib.so is missing"),
    "tampered manifest": (_tamper_manifest, "bundle.txt was altered", "bundle.txt was altered"),
    "truncated manifest": (_truncate_manifest, "bundle.txt was truncated", "bundle.txt was altered or truncated"),
    "no bundle": (_no_bundle, "Expected the directory of an unpacked rpe_tvm-bundle", "No bundle of rpe_tvm"),
    "other format": (_edited("bundle 1\n", "bundle 2\n"), "has format 2", "has format 2"),
    "other operator": (_edited("operator attention", "operator convolution"), "operator convolution", "convolution"),
    "wrong CPU": (_edited(",avx2,", ",avx2,avx9000,"), "x86_64-haswell: this CPU lacks avx9000", "lacks avx9000"),
    "other machine": (_edited(" x86_64 2.", " vax 2."), "compiled for vax machines", "compiled for vax machines"),
    "old glibc": (_needs_a_new_glibc, "needs glibc 9.", "needs glibc 9."),
    "no libgomp": (_without_libgomp, "libgomp1), or package with --threads none", "apt install libgomp1"),
}


@pytest.mark.parametrize("kind", REFUSALS)
def test_refusals(damaged: Path, programs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str) -> None:
    damage, said_by_c, said_by_verify = REFUSALS[kind]
    damage(damaged)
    case = write_case(tmp_path / "case", arguments(1, 1, 5, 5))
    for program in ("attention.c", "attention.cpp"):
        done = run(programs / program, damaged, case, tmp_path / "out", check=False)
        assert done.returncode == 1 and done.stderr.startswith("error: ") and said_by_c in done.stderr
    assert main(["verify", str(damaged)]) == 1
    captured = capsys.readouterr()
    assert said_by_verify in captured.out + captured.err


@pytest.mark.parametrize("sizes", [(4, 15), (0, 16), (4, 0)], ids=str)
def test_impossible_sizes(damaged: Path, programs: Path, tmp_path: Path, sizes: tuple[int, int]) -> None:
    columns, step = sizes
    edit(damaged, lambda text: re.sub(r" 16 fft \d+ 16 ", f" 16 fft {columns} {step} ", text))
    case = write_case(tmp_path / "case", arguments(1, 1, 5, 5))
    done = run(programs / "attention.c", damaged, case, tmp_path / "out", check=False)
    assert done.returncode == 1 and "bundle.txt has impossible sizes: library x86_64-haswell 16 fft" in done.stderr


def test_the_undamaged_one_runs(damaged: Path, programs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    edit(damaged, lambda text: text.replace("versions ", "versions test 1 "))  # editing alone refuses nothing
    replace_library(damaged, lambda code: code + b"\0")
    run(programs / "self_check", damaged, 20)
    assert main(["verify", str(damaged)]) == 0
    assert "runs here and is taken" in capsys.readouterr().out


@needs_qemu
def test_the_wrong_arm_cpu(damaged: Path, arm_programs: Path) -> None:
    edit(damaged, lambda text: text.replace(" asimd,fp\n", " asimd,fp,sve9\n"))
    done = emulated(arm_programs / "self_check", damaged, check=False)
    assert done.returncode == 1
    assert "aarch64-cortex-a72: this CPU lacks sve9" in done.stderr
    assert "x86_64-haswell: compiled for x86_64 machines, and this is aarch64" in done.stderr


def test_a_program_without_rdynamic(unpacked: Path, tmp_path: Path) -> None:
    sources = [unpacked / "examples" / "self_check.c", *(unpacked / "src").glob("*.c")]
    run("gcc", "-std=c99", "-I", unpacked / "include", *sources, "-o", tmp_path / "program", "-ldl", "-lm")
    done = run(tmp_path / "program", unpacked, check=False)
    assert done.returncode == 1 and "Link the program with -rdynamic" in done.stderr


CALLS = """
#include <stdio.h>
#include <string.h>
#include "rpe_tvm.h"

static rpe_tvm_operator *attention;
static float numbers[64];

static rpe_tvm_arguments good(void) {
  rpe_tvm_arguments a = {0};
  a.batch = a.heads = 1, a.n_query = a.n_key = 2, a.num_offsets = 3, a.num_features = 3, a.head_dim = 6;
  a.query = a.key = a.value = a.rpe_bias = a.projection = numbers, a.out = numbers + 32;
  return a;
}

#define CALL(change) do { \\
    rpe_tvm_arguments a = good(); \\
    int status; \\
    change; \\
    status = rpe_tvm_attention(attention, &a); \\
    printf("%d %s\\n", status, status == 0 ? "" : rpe_tvm_last_error()); \\
  } while (0)

int main(int argc, char **argv) {
  int i;
  for (i = 0; i < 64; ++i) numbers[i] = (float)i / 64;
  attention = rpe_tvm_open(argv[argc - 1]);
  CALL((void)0);
  CALL(a.n_query = 65; a.num_offsets = 66);
  CALL(a.n_key = 0; a.num_offsets = 1);
  CALL(a.num_offsets = 4);
  CALL(a.head_dim = 8);
  CALL(a.num_features = 4);
  CALL(a.batch = -1);
  CALL(a.batch = (int64_t)1 << 60);
  CALL(a.batch = (int64_t)1 << 40; a.value_strides.head = 12; a.value_strides.position = 6);
  CALL(a.feature_map = (rpe_tvm_feature_map)7);
  CALL(a.value = NULL);
  CALL(a.out = NULL);
  CALL(a.out = (float *)a.value + 4);
  CALL(a.query_strides.head = -1);
  CALL(a.heads = 2; a.out_strides.batch = 1; a.out_strides.position = 6);
  CALL(a.key = (const float *)((const char *)a.key + 1));
  CALL(a.n_query = a.n_key = a.num_offsets = 0; a.query = a.key = a.value = NULL);
  printf("%d\\n", rpe_tvm_attention(NULL, NULL));
  printf("%d\\n", rpe_tvm_open(NULL) == NULL);
  rpe_tvm_close(attention);
  rpe_tvm_close(NULL);
  return 0;
}
"""


def test_bad_arguments(unpacked: Path, tmp_path: Path) -> None:
    (tmp_path / "calls.c").write_text(CALLS)
    sources = [tmp_path / "calls.c", *(unpacked / "src").glob("*.c")]
    sanitize = "-fsanitize=address,undefined"
    program = tmp_path / "calls"
    run("gcc", "-g", sanitize, "-std=c99", "-I", unpacked / "include", *sources, "-o", program, "-rdynamic", "-ldl")
    lines = run(program, unpacked, ASAN_OPTIONS="allocator_may_return_null=1").stdout.splitlines()
    expected = [
        "0 ",
        "-1 Invalid length: expected at most 64 queries and keys, got 65 and 2",
        "-1 Invalid n_key: expected at least one position",
        "-1 Invalid num_offsets: expected n_query + n_key - 1 = 3, got 4",
        "-1 Wrong bundle: it has 3 features and head_dim 6, the call has 3 and 8",
        "-1 Wrong bundle: it has 3 features and head_dim 6, the call has 4 and 6",
        "-1 Invalid size: expected no negative one, got batch -1",
        "-1 Invalid size: no memory holds batch",
        "-1 Out of memory for intermediate results",
        "-1 Unknown feature map 7",
        "-1 Invalid value: expected an array, got NULL",
        "-1 Invalid out: expected an array, got NULL",
        "-1 Invalid out: expected memory of its own",
        "-1 Invalid strides of query: expected no negative one",
        "-1 Invalid strides of out: expected distinct elements",
        "-1 Invalid key: expected an address that is a multiple of 4",
        "0 ",
        "-1",
        "1",
    ]
    assert len(lines) == len(expected)
    for line, begin in zip(lines, expected, strict=True):
        assert line.startswith(begin), line
