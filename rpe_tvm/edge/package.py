"""Writes a bundle: compiled libraries, what they need, and a C and C++ host, in one reproducible archive."""

from __future__ import annotations

import json
import os
import re
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from rpe_tvm.edge import archive, contents, licence
from rpe_tvm.edge.contents import Contents, File, Library, Variant
from rpe_tvm.errors import BuildError
from rpe_tvm.plan import twiddles
from rpe_tvm.plan.config import AttentionConfig
from rpe_tvm.targets import TargetSpec

DEPLOY = Path(__file__).resolve().parent.parent / "deploy"


@dataclass(frozen=True)
class Packed:
    """What `package` wrote.

    Attributes
    ----------
    path
        The archive.
    contents
        What its ``bundle.txt`` says.
    host_bytes
        Target -> size of the C host, compiled for it.
    """

    path: Path
    contents: Contents
    host_bytes: Mapping[str, int]


def package(
    configs: Mapping[TargetSpec, Sequence[AttentionConfig]],
    out: str | os.PathLike[str],
    threads: Literal["openmp", "none"] = "openmp",
) -> Packed:
    """Compile an operator for some CPUs and write a bundle.

    The same input gives the same bytes: files are sorted and have a fixed date.

    Parameters
    ----------
    configs
        Target -> the lengths to compile for it. All have the same num_features and head_dim, and all targets the same
        lengths.
    out
        The archive to write, ``*.tar.gz``. A file that is there is replaced when the new one is whole.
    threads
        ``"openmp"``, or ``"none"`` for devices without libgomp and libstdc++: a call then runs in one thread.

    Raises
    ------
    BuildError
        If something does not compile, the configs do not belong together, or `out` cannot be written.
    """
    ordered = {target: sorted(each, key=lambda config: config.length) for target, each in configs.items()}
    sizes = {(config.num_features, config.head_dim) for each in ordered.values() for config in each}
    lengths = {tuple(config.length for config in each) for each in ordered.values()}
    if len(sizes) != 1 or len(lengths) != 1:
        raise BuildError(
            f"A bundle holds one operator: expected one num_features m and head_dim d and the same lengths for every "
            f"target, got m, d {sorted(sizes)} and lengths {sorted(lengths)}."
        )
    ((num_features, head_dim),) = sizes
    files = template("bundle")
    # sorted, so that a tie between variants ends as in rpe_tvm.runtime.load
    variants = tuple(
        _variant(target, ordered[target], threads, files) for target in sorted(ordered, key=lambda each: each.id)
    )
    described = Contents("attention", num_features, head_dim, package_versions(), variants)
    files[contents.FILE] = contents.write(described).encode()
    files[licence.FILE] = licence.text().encode()
    files[contents.SUMS] = contents.sums(files).encode()
    host_bytes = {target.id: _host_bytes(target) for target in ordered}
    path = archive.pack(Path(out), f"rpe_tvm-attention-m{num_features}-d{head_dim}", files)
    return Packed(path, described, host_bytes)


def template(name: str) -> dict[str, bytes]:
    """Path -> content of the files below ``deploy/<name>``."""
    top = DEPLOY / name
    found = {path.relative_to(top).as_posix(): path for path in top.rglob("*") if path.is_file()}
    if "README.md" not in found:
        raise BuildError(f"The package is incomplete: there is nothing in {top}. Install rpe_tvm again.")
    return {path: found[path].read_bytes() for path in found}


def _variant(
    target: TargetSpec,
    configs: Sequence[AttentionConfig],
    threads: Literal["openmp", "none"],
    files: dict[str, bytes],
) -> Variant:
    """Compile a variant and add its files to `files`."""
    from rpe_tvm import build
    from rpe_tvm.build import manifest

    libraries, codes = [], []
    for config in configs:
        artefact = build.compile_operator(config, target, threads)
        place = f"{contents.KERNELS}/{config.name}/{target.id}"
        added = [f"{place}/{name}" for name in (manifest.LIBRARY, manifest.FILE)]
        for path in added:
            files[path] = (artefact / Path(path).name).read_bytes()
        library, tables = File.of(added[0], files[added[0]]), None
        if config.algorithm == "fft":
            path = f"{place}/{contents.TABLES}"
            files[path] = twiddles.tables(config).astype(np.dtype("<f4")).tobytes()
            tables = File.of(path, files[path])
        *_, columns = twiddles.feature_shape(config, 1, 1, 1, 1)
        step = twiddles.position_step(config)
        schedule = json.loads(files[added[1]])["schedule"]["source"]
        libraries.append(Library(config.length, config.algorithm, columns, step, schedule, library, tables))
        codes.append(files[added[0]])
    return Variant(
        target=target.id,
        machine=target.machine,
        glibc=needed_glibc(codes),
        threads=threads,
        features=target.features,
        libraries=tuple(libraries),
    )


def needed_glibc(libraries: Sequence[bytes]) -> str:
    """The highest version of the C library that the symbols of these libraries name, such as ``2.17``."""
    found = [tuple(map(int, match)) for code in libraries for match in re.findall(rb"GLIBC_(\d+)\.(\d+)", code)]
    return ".".join(map(str, max(found, default=(2, 0))))


def package_versions() -> dict[str, str]:
    """Versions of the packages that compile."""
    from rpe_tvm.build import manifest

    return dict(sorted(manifest.versions().items()))


def _host_bytes(target: TargetSpec) -> int:
    """The size of the C host on a target, as a stripped shared library; shows that it compiles, too."""
    from rpe_tvm.build import link

    cxx, *options = link.find_compiler(target.machine)
    compiler = cxx.replace("clang++", "clang").replace("g++", "gcc").replace("c++", "cc")
    bundle = DEPLOY / "bundle"
    sources = sorted(map(str, (bundle / "src").glob("*.c")))
    with tempfile.TemporaryDirectory() as scratch:
        library = Path(scratch) / "host.so"
        flags = ("-std=c99", "-Os", "-fPIC", "-shared", "-s", "-I", str(bundle / "include"))
        command = [compiler, *options, *flags, "-o", str(library), *sources]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        except OSError as error:
            raise BuildError(
                f"Could not start the C compiler {compiler!r}: {error}. Install it beside {cxx}."
            ) from error
        if done.returncode != 0:
            raise BuildError(f"The C host does not compile for {target.id}:\n{done.stderr.strip()}")
        return library.stat().st_size
