"""Peak memory of one training step, each measured in a process of its own.

`python -m rpe_tvm.bench_train_memory JSON` is that process: it prints the bytes.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rpe_tvm import bench_machine
from rpe_tvm.bench_train_steps import OPERATOR, PEERS, Size, make_inputs, step_bytes, step_of
from rpe_tvm.errors import RpeTvmError

STATUS = Path("/proc/self/status")


class MemoryMeasurementError(RpeTvmError, RuntimeError):
    """The process that measures a step failed."""


@dataclass(frozen=True)
class Peak:
    """Peak bytes of one contestant's step above its inputs; scaled where it was measured at a smaller n."""

    name: str
    bytes: int
    measured_n: int


@dataclass(frozen=True)
class Peaks:
    """The peaks of all contestants at one length, the operator's first."""

    n: int
    of: tuple[Peak, ...]

    def ratio(self, name: str) -> float:
        """How many times the operator's memory a peer takes."""
        found = {peak.name: peak.bytes for peak in self.of}
        return found[name] / found[OPERATOR]

    def to_json(self) -> dict[str, Any]:
        """The peaks as JSON values, the ratios included."""
        return {
            "n": self.n,
            "peaks": {
                peak.name: {"bytes": peak.bytes, "measured_n": peak.measured_n, "ratio": self.ratio(peak.name)}
                for peak in self.of
            },
        }


def peaks(sizes: Sequence[Size], threads: int, on_peaks: Callable[[Peaks], None]) -> list[Peaks]:
    """Measure every contestant at each size; a peer that does not fit is measured where it does, and scaled.

    The scale is the ratio of the two estimates of `step_bytes`: lengths of transforms for torch.fft, n^2 for softmax.

    Parameters
    ----------
    sizes
        What to measure at.
    threads
        Threads of torch and of the operator.
    on_peaks
        Called with the peaks of each size as soon as they are there.

    Raises
    ------
    MemoryMeasurementError
        If a step fails or gives numbers that are not finite.
    """
    found = []
    for size in sizes:
        # twice: the first process may have to compile, which takes memory of its own
        own = Peak(OPERATOR, min(measure(OPERATOR, size, threads) for _ in range(2)), size.n)
        of_peers = tuple(_scaled_peak(name, size, threads) for name in PEERS)
        found.append(Peaks(size.n, (own, *of_peers)))
        on_peaks(found[-1])
    return found


def _scaled_peak(name: str, size: Size, threads: int) -> Peak:
    small = size
    while small.n > 1 and bench_machine.shortage(step_bytes(name, small), bench_machine.free_bytes()) is not None:
        small = replace(small, n=small.n // 2)
    scale = step_bytes(name, size) / step_bytes(name, small)
    # twice, as the operator: when autograd frees an array differs from run to run
    least = min(measure(name, small, threads) for _ in range(2))
    return Peak(name, round(scale * least), small.n)


def measure(name: str, size: Size, threads: int) -> int:
    """Peak resident bytes of one contestant's first step in a fresh process, above what was there with its inputs.

    Gradients and code that the step loads are included.
    """
    request = json.dumps({"name": name, "size": asdict(size), "threads": threads})
    done = subprocess.run(
        [sys.executable, "-m", "rpe_tvm.bench_train_memory", request],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        check=False,
    )
    if done.returncode != 0:
        raise MemoryMeasurementError(
            f"Cannot measure the memory of {PEERS.get(name, name)} at n={size.n}: expected exit status 0, got "
            f"{done.returncode} (-9: killed for lack of memory; choose shorter --memory-lengths). Its last words: "
            f"{done.stderr.strip()[-1000:] or 'none'}"
        )
    return int(done.stdout.split()[-1])


def _child(name: str, size: Size, threads: int) -> int:
    """What `measure` asks for, in this process."""
    import torch

    torch.set_num_threads(threads)
    inputs = make_inputs(size)
    step = step_of(name, inputs, size.is_causal)
    with contextlib.suppress(OSError):  # where the peak cannot be reset, that of the imports counts
        Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    results = step()
    peak = _status("VmHWM") - before
    if not all(bool(each.isfinite().all()) for each in results):
        sys.exit(f"wrong result of {name}: expected finite gradients, got some that are not")
    return peak


def _status(field: str) -> int:
    """A line of this process's status, in bytes."""
    lines = (line.split() for line in STATUS.read_text().splitlines())
    return 1024 * next(int(words[1]) for words in lines if words[0] == f"{field}:")


if __name__ == "__main__":
    asked = json.loads(sys.argv[1])
    print(_child(asked["name"], Size(**asked["size"]), asked["threads"]))
