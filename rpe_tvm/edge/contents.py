"""What a bundle says of itself: ``bundle.txt``, which the C host reads, and ``SHA256SUMS``.

The lines of ``bundle.txt`` are described in ``deploy/bundle/src/bundle.h``.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath

from rpe_tvm.errors import ArtefactError

FORMAT = 1
FILE = "bundle.txt"
SUMS = "SHA256SUMS"
KERNELS = "kernels"  # laid out as `python -m rpe_tvm compile --out` does
TABLES = "tables.bin"

_FIRST = f"rpe_tvm-bundle {FORMAT}"


@dataclass(frozen=True)
class File:
    """A file of a bundle.

    Attributes
    ----------
    path
        Relative to the bundle.
    """

    path: str
    size: int
    sha256: str

    @classmethod
    def of(cls, path: str, content: bytes) -> File:
        """The file with this content."""
        return cls(path, len(content), hashlib.sha256(content).hexdigest())


@dataclass(frozen=True)
class Library:
    """A compiled length of a variant.

    Attributes
    ----------
    length
        It serves every n up to it.
    algorithm
        ``direct`` or ``fft``.
    columns, step
        Last axis of feature buffers, and what positions are rounded up to before they fill whole rows of it.
    schedule
        ``tuned`` or ``default``.
    file, tables
        The library, and its constant tables if it takes any.
    """

    length: int
    algorithm: str
    columns: int
    step: int
    schedule: str
    file: File
    tables: File | None


@dataclass(frozen=True)
class Variant:
    """The libraries of one target, shortest first.

    Attributes
    ----------
    target
        Its name, such as ``aarch64-cortex-a72``.
    machine
        ``x86_64``, ``aarch64`` or ``armv7``.
    glibc
        The oldest version of the C library that has all that the libraries call.
    threads
        ``openmp``, or ``none``: then libraries need nothing but the C library.
    features
        What the CPU must have, by its names in /proc/cpuinfo.
    """

    target: str
    machine: str
    glibc: str
    threads: str
    features: tuple[str, ...]
    libraries: tuple[Library, ...]


@dataclass(frozen=True)
class Contents:
    """What ``bundle.txt`` says."""

    op: str
    num_features: int
    head_dim: int
    versions: Mapping[str, str]
    variants: tuple[Variant, ...]


def write(contents: Contents) -> str:
    """The text of ``bundle.txt``."""
    versions = " ".join(f"{name} {version}" for name, version in contents.versions.items())
    lines = [
        _FIRST,
        f"operator {contents.op} {contents.num_features} {contents.head_dim}",
        f"versions {versions}",
    ]
    for variant in contents.variants:
        features = ",".join(variant.features) or "-"
        lines.append(f"variant {variant.target} {variant.machine} {variant.glibc} {variant.threads} {features}")
        for each in variant.libraries:
            lines.append(
                f"library {variant.target} {each.length} {each.algorithm} {each.columns} {each.step} {each.schedule} "
                f"{each.file.size} {each.file.sha256} {each.file.path}"
            )
            if each.tables is not None:
                tables = f"{each.tables.size} {each.tables.sha256} {each.tables.path}"
                lines.append(f"tables {variant.target} {each.length} {tables}")
    return sign("".join(f"{line}\n" for line in lines))


def sign(text: str) -> str:
    """Append the last line, the hash of all others."""
    return f"{text}end {hashlib.sha256(text.encode()).hexdigest()}\n"


def read(text: str) -> Contents:
    """What a ``bundle.txt`` says.

    Raises
    ------
    ArtefactError
        If it is none, of another format or operator, or was altered or truncated.
    """
    found = re.match(r"rpe_tvm-bundle (\d+)\n", text)
    if found is None:
        raise ArtefactError(f"{FILE} is no bundle of rpe_tvm.")
    if int(found[1]) != FORMAT:
        raise ArtefactError(
            f"The bundle has format {found[1]}, this rpe_tvm reads format {FORMAT}: use the version that packaged it."
        )
    body, separator, end = text.rpartition("end ")
    if not separator or not body.endswith("\n") or not end.endswith("\n"):
        raise ArtefactError(f"{FILE} was truncated: its last line is missing. Unpack the bundle again.")
    if sign(body) != text:
        raise ArtefactError(f"{FILE} was altered: its hash does not fit. Unpack the bundle again.")
    try:
        return _parse([line.split(" ") for line in body.splitlines()])
    except (ValueError, IndexError, KeyError) as error:
        raise ArtefactError(f"{FILE} has a line that this rpe_tvm cannot read: {error}") from error


def _parse(lines: list[list[str]]) -> Contents:
    op, num_features, head_dim = next(line[1:] for line in lines if line[0] == "operator")
    if op != "attention":
        raise ArtefactError(f"The bundle is of the operator {op}, this rpe_tvm runs attention.")
    words = next(line[1:] for line in lines if line[0] == "versions")
    tables = {
        (target, length): File(path, int(size), sha256)
        for kind, target, length, size, sha256, path in (line for line in lines if line[0] == "tables")
    }
    libraries: dict[str, list[Library]] = {}
    for line in lines:
        if line[0] == "library":
            target, length, algorithm, columns, step, schedule, size, sha256, path = line[1:]
            file = File(path, int(size), sha256)
            found = tables.get((target, length))
            library = Library(int(length), algorithm, int(columns), int(step), schedule, file, found)
            libraries.setdefault(target, []).append(library)
    variants = []
    for line in lines:
        if line[0] == "variant":
            target, machine, glibc, threads, features = line[1:]
            needed = () if features == "-" else tuple(features.split(","))
            variants.append(Variant(target, machine, glibc, threads, needed, (*libraries[target],)))
    versions = dict(zip(words[::2], words[1::2], strict=True))
    return Contents(op, int(num_features), int(head_dim), versions, tuple(variants))


def sums(files: Mapping[str, bytes]) -> str:
    """The text of ``SHA256SUMS``, as ``sha256sum -c`` reads it."""
    return "".join(f"{hashlib.sha256(content).hexdigest()}  {path}\n" for path, content in sorted(files.items()))


def read_sums(text: str) -> dict[str, str]:
    """Path -> SHA-256 of a ``SHA256SUMS``; `ArtefactError` if it is none, or names a place outside of the bundle."""
    found = {}
    for line in text.splitlines():
        match = re.fullmatch(r"([0-9a-f]{64})  (.+)", line)
        if match is None or ".." in PurePosixPath(match[2]).parts or PurePosixPath(match[2]).is_absolute():
            raise ArtefactError(f"{SUMS} has a line that is none of a bundle: {line!r}. Unpack the bundle again.")
        found[match[2]] = match[1]
    return found
