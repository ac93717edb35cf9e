"""What is in a bundle, and that it is the same every time."""

from __future__ import annotations

import gzip
import hashlib
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest

from rpe_tvm import targets
from rpe_tvm.cli import main
from rpe_tvm.edge import contents, package, verify
from rpe_tvm.edge.package import needed_glibc
from rpe_tvm.errors import ArtefactError, BuildError
from rpe_tvm.plan import twiddles
from rpe_tvm.runtime import load

sys.path.insert(0, str(Path(__file__).resolve().parent))
from bundles import HEAD_DIM, NUM_FEATURES, configs, make, run, unpack  # noqa: E402

pytestmark = pytest.mark.compile


def test_the_same_input_gives_the_same_bytes(packed, cache, tmp_path: Path) -> None:
    names = tuple(variant.target.partition("-")[2] for variant in packed.contents.variants)
    again = make(tuple(reversed(names)), tmp_path / "again.tar.gz")
    assert again.path.read_bytes() == packed.path.read_bytes()
    assert not [path for path in tmp_path.iterdir() if path != again.path]
    with tarfile.open(packed.path) as archive:
        members = archive.getmembers()
    assert [member.name for member in members] == sorted(member.name for member in members)
    assert {(member.mtime, member.uid, member.gid, member.mode) for member in members} == {(315532800, 0, 0, 0o644)}
    assert gzip.decompress(packed.path.read_bytes())[:4] == b"rpe_"


def test_what_is_in_it(packed, unpacked: Path) -> None:
    assert contents.read((unpacked / contents.FILE).read_text()) == packed.contents
    sums = contents.read_sums((unpacked / contents.SUMS).read_text())
    found = {path.relative_to(unpacked).as_posix() for path in unpacked.rglob("*") if path.is_file()}
    assert found == {*sums, contents.SUMS}
    for name, sha256 in sums.items():
        assert hashlib.sha256((unpacked / name).read_bytes()).hexdigest() == sha256
    wanted = {"README.md", "LICENSE", "CMakeLists.txt", "bundle.txt", "include/rpe_tvm.h", "include/rpe_tvm.hpp"}
    assert wanted | {"examples/attention.c", "examples/attention.cpp"} <= found
    assert set(packed.contents.versions) == {"apache-tvm", "apache-tvm-ffi", "rpe_tvm"}
    licence = (unpacked / "LICENSE").read_text()
    assert all(said in licence for said in ("rpe_tvm 0.1.0", "Apache License 2.0", "GCC Runtime Library Exception"))
    (library, *_) = unpacked.rglob("x86_64-haswell/lib.so")  # what it has of compiler-rt is named with its terms
    assert b"__truncsfhf2" in library.read_bytes() and "Permission is hereby granted" in licence
    (fft, _) = configs(8)
    tables = np.fromfile(unpacked / f"kernels/{fft.name}/x86_64-haswell/tables.bin", "<f4")
    np.testing.assert_array_equal(tables, twiddles.tables(fft))


def test_sha256sum_reads_the_sums(unpacked: Path) -> None:
    subprocess.run(["sha256sum", "--quiet", "-c", contents.SUMS], cwd=unpacked, check=True)


def test_python_loads_the_kernels(unpacked: Path) -> None:
    attention = load(unpacked / contents.KERNELS)
    assert (attention.num_features, attention.head_dim, attention.lengths) == (NUM_FEATURES, HEAD_DIM, (16, 64))


def test_verify_reads_the_archive_and_explains(packed, capsys: pytest.CaptureFixture[str]) -> None:
    report = verify(packed.path)
    assert report.is_good and report.taken == "x86_64-haswell" and set(report.errors) == {16, 64}
    assert main(["verify", str(packed.path)]) == 0
    out = capsys.readouterr().out
    assert "x86_64-haswell: runs here and is taken" in out
    if len(packed.contents.variants) > 1:
        assert "aarch64-cortex-a72: does not run here: compiled for aarch64 machines, and this is x86_64" in out


@pytest.mark.parametrize("keep", [0, 100, -1000])
def test_a_truncated_archive(packed, tmp_path: Path, keep: int) -> None:
    (tmp_path / "cut.tar.gz").write_bytes(packed.path.read_bytes()[:keep])
    with pytest.raises(ArtefactError, match="Cannot read the bundle .*cut.tar.gz"):
        verify(tmp_path / "cut.tar.gz")


def test_what_is_no_archive(tmp_path: Path) -> None:
    with pytest.raises(ArtefactError, match="Cannot read the bundle"):
        verify(tmp_path / "missing.tar.gz")
    with tarfile.open(tmp_path / "other.tar.gz", "w:gz") as archive:
        archive.add(__file__, "other/file.py")
    with pytest.raises(ArtefactError, match="has no SHA256SUMS"):
        verify(tmp_path / "other.tar.gz")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / contents.SUMS).write_text(contents.sums({"model.txt": b""}))
    (tmp_path / "model" / "model.txt").touch()
    with pytest.raises(ArtefactError, match="checked by its own program, run_model"):
        verify(tmp_path / "model")


def test_sums_do_not_leave_the_bundle() -> None:
    for path in ("../x", "/etc/passwd", "a/../../x"):
        with pytest.raises(ArtefactError, match="none of a bundle"):
            contents.read_sums(f"{'0' * 64}  {path}\n")


def test_without_threads_only_the_c_library_is_needed(cache, programs: Path, tmp_path: Path) -> None:
    packed = package({targets.preset("haswell"): configs(8)[1:]}, tmp_path / "serial.tar.gz", "none")
    bundle = unpack(packed.path, tmp_path / "serial")
    (library,) = bundle.rglob("lib.so")
    assert b"libgomp" not in library.read_bytes() and b"libstdc++" not in library.read_bytes()
    assert ", ok;" in run(programs / "self_check", bundle, 1, 64).stdout
    assert verify(bundle).is_good
    assert packed.contents.variants[0].threads == "none"


def test_variants_that_do_not_belong_together(tmp_path: Path) -> None:
    fft, direct = configs(8)
    haswell, skylake = targets.preset("haswell"), targets.preset("skylake-avx512")
    with pytest.raises(BuildError, match="A bundle holds one operator"):
        package({haswell: [fft], skylake: [direct]}, tmp_path / "bundle.tar.gz")
    with pytest.raises(BuildError, match="A bundle holds one operator"):
        package({}, tmp_path / "bundle.tar.gz")


def test_the_command(cache, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--features", "3", "--head-dim", "6", "--lengths", "64", "--out", str(tmp_path / "b.tar.gz")]
    assert main(["package", "--target", "haswell", *options]) == 0
    assert "direct default schedule" in capsys.readouterr().out
    assert verify(tmp_path / "b.tar.gz").is_good
    assert main(["package", "--target", "sm_90", *options]) == 1
    assert "A bundle is for CPUs" in capsys.readouterr().err


def test_the_newest_glibc_that_symbols_name() -> None:
    assert needed_glibc([b"GLIBC_2.4\0GLIBC_2.17\0", b"GLIBC_2.9\0"]) == "2.17"
