"""Verifies a bundle on this machine: its hashes, which variant runs and why the others do not, and its numbers."""

from __future__ import annotations

import os
import platform
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from rpe_tvm import reference
from rpe_tvm.edge import archive, contents
from rpe_tvm.edge.contents import Contents, Variant
from rpe_tvm.errors import ArtefactError
from rpe_tvm.machine import this_machine
from rpe_tvm.runtime import cpu, load

TOLERANCE = 1e-4  # of float32, times the largest value; the first causal rows by FFT come to 3e-5
_CHECKED = 300  # positions of a check: the reference takes n^2


@dataclass(frozen=True)
class Report:
    """What `verify` found.

    Attributes
    ----------
    contents
        What the bundle says of itself.
    files
        How many files were checked.
    refusals
        Target -> why it does not run here, for each variant that does not.
    taken
        The target of the variant that runs here, None if there is none.
    errors
        Compiled length -> largest error of that variant against the reference, over the largest value.
    """

    contents: Contents
    files: int
    refusals: Mapping[str, str]
    taken: str | None
    errors: Mapping[int, float]

    @property
    def is_good(self) -> bool:
        """Whether a variant runs here and computes the right numbers."""
        return self.taken is not None and all(error <= TOLERANCE for error in self.errors.values())


def verify(path: str | os.PathLike[str]) -> Report:
    """Verify the bundle at `path`, an archive or the directory that it was unpacked to.

    Raises
    ------
    ArtefactError
        If it is no bundle, or damaged.
    """
    files = archive.read(Path(path))
    found = contents.read(files[contents.FILE].decode(errors="replace"))
    for variant in found.variants:
        for library in variant.libraries:
            for file in (library.file, library.tables):
                if file is not None and contents.File.of(file.path, files.get(file.path, b"")) != file:
                    raise ArtefactError(f"{file.path} is not the file that {contents.FILE} names. Package it again.")
    refusals = {variant.target: reason for variant in found.variants if (reason := refusal(variant)) is not None}
    fit = [variant for variant in found.variants if variant.target not in refusals]
    errors: dict[int, float] = {}
    taken = max(fit, key=lambda variant: len(variant.features), default=None)
    if taken is not None:
        with tempfile.TemporaryDirectory() as directory:
            archive.write(files, Path(directory))
            try:
                errors = {each.length: _error(Path(directory, each.file.path).parent) for each in taken.libraries}
            except ArtefactError as error:
                reasons = "; ".join(reason.removeprefix(f"{directory}/") for reason in error.reasons)
                refusals[taken.target] = reasons or str(error)
                taken = None
    return Report(found, len(files), refusals, None if taken is None else taken.target, errors)


def refusal(variant: Variant) -> str | None:
    """Why a variant cannot run on this machine, None if nothing speaks against it."""
    here = this_machine()
    if variant.machine != here:
        return f"compiled for {variant.machine} machines, and this is {here}"
    lacking = sorted(set(variant.features) - cpu.cpu_flags())
    if lacking:
        return f"this CPU lacks {', '.join(lacking)}"
    library, version = platform.libc_ver()
    if library == "glibc" and _numbers(version) < _numbers(variant.glibc):
        return f"needs glibc {variant.glibc} or later, this system has {version}; package on an older system"
    return None


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("."))


def _error(artefact: Path) -> float:
    """The largest error of an artefact against the float64 reference, over the largest value."""
    attention = load(artefact)
    random = np.random.default_rng(0)
    n, heads = min(*attention.lengths, _CHECKED), 2
    query, key, value = random.standard_normal((3, 1, heads, n, attention.head_dim)).astype(np.float32)
    rpe_bias = 0.5 * random.standard_normal((heads, 2 * n - 1)).astype(np.float32)
    projection = random.standard_normal((attention.num_features, attention.head_dim)).astype(np.float32)
    worst = 0.0
    for is_causal in (False, True):
        out = attention(query, key, value, rpe_bias, projection, is_causal=is_causal)
        *_, expected = reference.attention(query, key, value, rpe_bias, projection, is_causal=is_causal)
        error = float(np.max(np.abs(out - expected)) / np.max(np.abs(expected)))
        worst = max(worst, error if np.isfinite(error) else np.inf)
    return worst
