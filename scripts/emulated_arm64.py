"""Checks cross-compiled operators against the float64 reference, through `rpe_tvm.runtime`, as a board would run them.

Run by scripts/emulated_arm64.sh: python3 emulated_arm64.py DIRECTORY [DIRECTORY...], each of one kind of operator.
"""

from __future__ import annotations

import platform
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import tvm_ffi

from rpe_tvm import reference, runtime
from rpe_tvm.runtime.cpu import cpu_flags

# by FFT, early rows of causal attention lose the digits by which their denominators are smaller
TOLERANCE, CAUSAL_TOLERANCE = 1e-6, 1e-4


def main(directories: list[str]) -> int:
    """Check all operators; returns 1 if one is wrong."""
    print(f"{platform.machine()}, Python {platform.python_version()}")
    print(f"NumPy {np.__version__}, apache-tvm-ffi {tvm_ffi.__version__}")
    print(f"CPU flags: {' '.join(sorted(cpu_flags()))}")
    wrong = 0
    for directory in directories:
        operator = runtime.load(directory)
        print(f"{Path(directory).name}: m={operator.num_features} d={operator.head_dim} lengths={operator.lengths}")
        for n_q, n_k in _sizes(operator.lengths):
            for feature_map in ("nprf", "prf"):
                for is_causal in (False, True):
                    wrong += not _is_right(operator, n_q, n_k, feature_map, is_causal)
    print(f"{wrong} wrong results")
    return int(wrong > 0)


def _sizes(lengths: tuple[int, ...]) -> list[tuple[int, int]]:
    """One position, and for each compiled length an odd number of queries and, once, another number of keys."""
    return [(1, 1), (2, 63), *((length - 1, length - 1) for length in lengths), (lengths[-1], lengths[-1] // 2 + 1)]


def _is_right(operator: runtime.Attention, n_q: int, n_k: int, feature_map: str, is_causal: bool) -> bool:
    random = np.random.default_rng(n_q)
    m, d = operator.num_features, operator.head_dim

    def normal(*shape: int) -> Any:
        return random.standard_normal(shape).astype("f4")

    query, key, value = 0.5 * normal(1, 2, n_q, d), 0.5 * normal(1, 2, n_k, d), normal(1, 2, n_k, d)
    arguments = query, key, value, 0.1 * normal(2, n_q + n_k - 1), normal(m, d)
    start = time.perf_counter()
    out = operator(*arguments, feature_map=feature_map, is_causal=is_causal)
    seconds = time.perf_counter() - start
    expected = reference.attention(*arguments, feature_map=feature_map, is_causal=is_causal)[2]
    error = np.linalg.norm(out - expected) / np.linalg.norm(expected)
    is_right = bool(error < (CAUSAL_TOLERANCE if is_causal else TOLERANCE))
    algorithm = operator.instance(max(n_q, n_k)).config.description
    print(
        f"  n_q={n_q:<5} n_k={n_k:<5} {feature_map:<5} {'causal' if is_causal else 'full':<7} {algorithm:<14} "
        f"error {error:.1e}  {'right' if is_right else 'WRONG'}  ({seconds:.2f} s emulated)",
        flush=True,
    )
    return is_right


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
