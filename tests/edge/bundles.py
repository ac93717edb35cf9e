"""Makes small bundles, compiles and runs the programs that come with them, and damages them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tarfile
import textwrap
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt

from rpe_tvm import reference, targets
from rpe_tvm.edge import Packed, contents, package
from rpe_tvm.plan.config import AttentionConfig

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import emulated as emulation  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
NUM_FEATURES, HEAD_DIM = 3, 6
TARGETS = ("haswell", "cortex-a72")
ARM = emulation.EMULATIONS["aarch64"]
FLAGS = ("-O1", "-Wall", "-Wextra", "-Werror")

needs_qemu = emulation.needs("aarch64")

Array = npt.NDArray[np.float32]


def configs(lanes: int) -> list[AttentionConfig]:
    """Up to 16 positions by FFT, up to 64 by tiles."""
    return [
        AttentionConfig(NUM_FEATURES, HEAD_DIM, 16, "fft", (4,), (4,), lanes=lanes),
        AttentionConfig(NUM_FEATURES, HEAD_DIM, 64, "direct", tile=(64, 64), lanes=lanes),
    ]


def make(names: tuple[str, ...], out: Path, threads: str = "openmp") -> Packed:
    """A bundle for the targets of these names."""
    chosen = {targets.preset(name): configs(targets.preset(name).lanes) for name in names}
    return package(chosen, out, threads)


def unpack(archive: Path, to: Path) -> Path:
    """Unpack as a user does, and return the directory."""
    with tarfile.open(archive) as opened:
        opened.extractall(to, filter="data")
    (top,) = to.iterdir()
    return top


def compile_program(top: Path, folders: list[str], program: Path, prefix: str = "") -> None:
    """Compile all C and C++ files of some folders to a program, with all warnings as errors."""
    objects = []
    for source in sorted(path for folder in folders for path in (top / folder).glob("*.c*")):
        objects.append(str(program.with_name(f"{source.stem}.o")))
        cpp = source.suffix == ".cpp"
        compiler = [f"{prefix}g++", "-std=c++17"] if cpp else [f"{prefix}gcc", "-std=c99", "-Wpedantic"]
        includes = ["-I", str(top / "include"), "-I", str(top / "src")]
        subprocess.run([*compiler, *FLAGS, *includes, "-c", str(source), "-o", objects[-1]], check=True)
    subprocess.run([f"{prefix}g++", *objects, "-o", str(program), "-rdynamic", "-ldl", "-lm"], check=True)


def compile_examples(bundle: Path, out: Path, prefix: str = "") -> None:
    """Compile the programs of a bundle as its README says, with all warnings as errors."""
    sources = sorted(map(str, (bundle / "src").glob("*.c")))
    objects = []
    for source in sources:
        objects.append(str(out / f"{Path(source).stem}.o"))
        c_flags = [*FLAGS, "-Wpedantic", "-std=c99", "-I", str(bundle / "include")]
        subprocess.run([f"{prefix}gcc", *c_flags, "-c", source, "-o", objects[-1]], check=True)
    for example in sorted((bundle / "examples").glob("*")):
        language = "g++" if example.suffix == ".cpp" else "gcc"
        standard = "-std=c++17" if example.suffix == ".cpp" else "-std=c99"
        program = out / (example.name if example.stem == "attention" else example.stem)
        command = [f"{prefix}{language}", *FLAGS, standard, "-I", str(bundle / "include"), str(example), *objects]
        subprocess.run([*command, "-o", str(program), "-rdynamic", "-ldl", "-lm"], check=True)


def page_commands(holding: str) -> str:
    """The commands of docs/deployment.md that this text is among, as they stand there."""
    blocks = re.findall(r"(?:^    .*\n)+", (ROOT / "docs" / "deployment.md").read_text(), re.MULTILINE)
    (found,) = (block for block in blocks if holding in block)
    return textwrap.dedent(found)


def run(*command: str | Path, check: bool = True, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a program."""
    environment = {**os.environ, "OMP_NUM_THREADS": "2", **variables}
    done = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, env=environment, timeout=60, check=False
    )
    if check:
        assert done.returncode == 0, done.stderr
    return done


def emulated(*command: str | Path, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Run a program for aarch64."""
    return run(ARM.emulator, "-L", ARM.libraries, *command, check=check)


def arguments(batch: int, heads: int, n_query: int, n_key: int) -> tuple[Array, ...]:
    """Random query, key, value, rpe_bias and projection."""
    random = np.random.default_rng(n_query)
    shapes = (
        (batch, heads, n_query, HEAD_DIM),
        (batch, heads, n_key, HEAD_DIM),
        (batch, heads, n_key, HEAD_DIM),
        (heads, max(n_query + n_key - 1, 0)),
        (NUM_FEATURES, HEAD_DIM),
    )
    return tuple(random.standard_normal(shape).astype(np.float32) for shape in shapes)


def write_case(path: Path, arrays: tuple[Array, ...], feature_map: str = "nprf", is_causal: bool = False) -> Path:
    """Write a case as examples/attention.c reads it."""
    query, key, *_, projection = arrays
    sizes = (*query.shape[:3], key.shape[2], *projection.shape, ("nprf", "prf").index(feature_map), is_causal)
    path.write_bytes(np.array(sizes, np.int64).tobytes() + b"".join(array.tobytes() for array in arrays))
    return path


def assert_close(got: Array, expected: npt.NDArray[np.float64]) -> None:
    """Equal up to the rounding of float32."""
    assert np.max(np.abs(got - expected), initial=0) <= 2e-5 * np.max(np.abs(expected), initial=0)


def expected_of(arrays: tuple[Array, ...], feature_map: str, is_causal: bool) -> npt.NDArray[np.float64]:
    """The float64 reference."""
    *_, out = reference.attention(*arrays, feature_map=feature_map, is_causal=is_causal)
    return out


def edit(bundle: Path, change: Callable[[str], str]) -> None:
    """Change bundle.txt, with a hash that fits again, and SHA256SUMS with it."""
    path = bundle / contents.FILE
    body, _, _ = path.read_text().rpartition("end ")
    changed = change(body)
    assert changed != body
    path.write_text(contents.sign(changed))
    sign(bundle)


def sign(bundle: Path) -> None:
    """Make SHA256SUMS fit the files again."""
    sums = bundle / contents.SUMS
    listed = contents.read_sums(sums.read_text())
    sums.write_text(contents.sums({name: (bundle / name).read_bytes() for name in listed}))


def replace_library(bundle: Path, change: Callable[[bytes], bytes]) -> None:
    """Change a library of this machine, as if it had been packaged so."""
    relative = f"kernels/attention-m{NUM_FEATURES}-d{HEAD_DIM}-n64/x86_64-haswell/lib.so"
    library = bundle / relative
    before = contents.File.of(relative, library.read_bytes())
    content = change(library.read_bytes())
    library.unlink()
    library.write_bytes(content)
    after = contents.File.of(relative, content)
    edit(bundle, lambda text: text.replace(f"{before.size} {before.sha256}", f"{after.size} {after.sha256}"))
    manifest = library.with_name("manifest.json")
    manifest.write_text(re.sub(before.sha256, after.sha256, manifest.read_text()))
    sign(bundle)
