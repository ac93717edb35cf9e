"""Checks compiled candidates on this machine's GPU against float64 rows, then times them in turns. Imports no tvm.

Times are those of replays of CUDA graphs, so what Python and the driver do does not count. They are of a whole call:
from query, key and value to the output.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rpe_tvm import bench_cuda_clock
from rpe_tvm.bench_cuda_reference import attention_rows
from rpe_tvm.bench_problem import Float64, Inputs, Rows, make_inputs
from rpe_tvm.errors import TuningError
from rpe_tvm.runtime import GpuInstance, load_gpu
from rpe_tvm.tune import gpu_amd
from rpe_tvm.tune.gpu_candidates import Size

if TYPE_CHECKING:
    import torch

DEVICE = "cuda"
HEADS = 8
CHECKED_ROWS = 8
# relative RMS error over the checked rows; right candidates are at 3e-7, 2.5e-3 and 3e-4
TOLERANCE = {"float32": 1e-5, "bfloat16": 1e-2, "float16": 2e-3}
# a graph holds so many calls that its replay takes about so long
REPLAY_SECONDS, MOST_CALLS = 0.01, 20


@dataclass(frozen=True)
class Timing:
    """What came of one candidate: seconds of a call by replay, its error, or why there are none."""

    seconds: tuple[float, ...]
    error: float
    failure: str = ""

    @property
    def median(self) -> float:
        """Seconds of a call."""
        return statistics.median(self.seconds)


@dataclass(frozen=True)
class _Check:
    """Inputs, and rows of their result in float64."""

    inputs: Inputs
    is_causal: bool
    rows: Rows
    expected: Float64


@dataclass(frozen=True)
class _Ready:
    """A candidate whose results are right: a graph of its calls, how many these are, and about how long it takes."""

    graph: Any
    calls: int
    seconds: float
    error: float


class GpuLostError(TuningError):
    """A candidate broke the GPU's context, and nothing more can run in this process; `label` names it."""

    def __init__(self, label: str, reason: str) -> None:
        super().__init__(f"The candidate {label} broke the GPU's context: {reason}. Go on without it: --resume.")
        self.label, self.reason = label, reason


def measure(size: Size, artefacts: Mapping[str, Path], seconds: float) -> dict[str, Timing]:
    """Check and time candidates, batch 1 and `HEADS` heads, with random numbers and the NPRF feature map.

    Parameters
    ----------
    size : Size
        Dtype, positions, features and channels.
    artefacts : mapping
        Name of a candidate -> directory of its artefact.
    seconds : float
        For all of them together, checks included; every one takes three turns at least.

    Raises
    ------
    GpuLostError
        If after a candidate nothing runs any more.
    """
    import torch

    deadline = time.monotonic() + seconds
    inputs = make_inputs(size.n, HEADS, size.num_features, size.head_dim).to(DEVICE, getattr(torch, size.dtype))
    checks = list(_checks(inputs))
    ready: dict[str, _Ready] = {}
    timings: dict[str, Timing] = {}
    for name, artefact in artefacts.items():
        prepared = bench_cuda_clock.attempt(functools.partial(_prepare, artefact, inputs, checks, size.dtype))
        if isinstance(prepared, bench_cuda_clock.Failure):
            _raise_if_lost(name, prepared.reason)
            timings[name] = Timing((), float("nan"), prepared.reason)
        else:
            ready[name] = prepared
    if not ready:
        return timings
    replays = {name: each.graph.replay for name, each in ready.items()}
    estimates = {name: each.seconds for name, each in ready.items()}
    turns = bench_cuda_clock.take_turns(replays, estimates, max(deadline - time.monotonic(), 0.0))
    for name, each in ready.items():
        per_call = tuple(time / each.calls for time in turns.times[name])
        timings[name] = Timing(per_call, each.error, turns.failures.get(name, ""))
    return timings


def _checks(inputs: Inputs) -> Iterator[_Check]:
    """A full bucket, and one that is not full, causal: only late rows there, because rows of few keys lose digits."""
    n = inputs.query.shape[2]
    for length, first, is_causal in ((n, 0, False), (max(n - 3, 1), n // 2, True)):
        part = _first_positions(inputs, length)
        rows = np.unique(np.linspace(min(first, length - 1), length - 1, CHECKED_ROWS).astype(int))
        yield _Check(part, is_causal, rows, attention_rows(rows, part, is_causal))


def _first_positions(inputs: Inputs, length: int) -> Inputs:
    cut = inputs.query.shape[2] - length
    query, key, value = (x[:, :, :length] for x in (inputs.query, inputs.key, inputs.value))
    bias = inputs.rpe_bias[:, cut : inputs.rpe_bias.shape[1] - cut].contiguous()
    return Inputs(query, key, value, bias, inputs.projection)


def _prepare(artefact: Path, inputs: Inputs, checks: list[_Check], dtype: str) -> _Ready:
    instance = gpu_amd.load(artefact) if gpu_amd.is_amd(artefact) else load_gpu(artefact)
    error = max(_error(instance, check) for check in checks)
    # written so that NaN fails
    if not error <= TOLERANCE[dtype]:
        raise TuningError(f"wrong result: relative error {error:.1e}, allowed {TOLERANCE[dtype]:.0e}")

    def call() -> torch.Tensor:
        return _attention(instance, inputs, False)

    (estimate,), _ = bench_cuda_clock.time_calls(call, 1)
    calls = max(1, min(MOST_CALLS, int(REPLAY_SECONDS / max(estimate, 1e-9))))
    graph, _ = bench_cuda_clock.capture(call, calls)
    (seconds,), _ = bench_cuda_clock.time_calls(graph.replay, 1)
    return _Ready(graph, calls, seconds, error)


def _error(instance: GpuInstance, check: _Check) -> float:
    # what is not written shall be seen
    out = _attention(instance, check.inputs, check.is_causal, fill=float("nan"))
    found = out[:, :, check.rows.tolist()].double().cpu().numpy()
    return float(np.linalg.norm(found - check.expected) / np.linalg.norm(check.expected))


def _attention(instance: GpuInstance, inputs: Inputs, is_causal: bool, fill: float | None = None) -> torch.Tensor:
    """A call as `rpe_tvm.torch.kernelized_attention` makes it: 16-bit numbers are converted for the FFT."""
    import torch

    from rpe_tvm.torch import cuda

    dtype = getattr(torch, instance.config.dtype)
    query, key, value = (x.to(dtype) for x in (inputs.query, inputs.key, inputs.value))
    out = torch.empty(query.shape, dtype=dtype, device=query.device)
    if fill is not None:
        out.fill_(fill)
    cuda.attention(
        *(instance, query, key, value, inputs.rpe_bias, inputs.projection, out),
        feature_map="nprf",
        is_causal=is_causal,
    )
    return out.to(inputs.query.dtype)


def _raise_if_lost(name: str, reason: str) -> None:
    import torch

    if DEVICE != "cuda":
        return
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        raise GpuLostError(name, reason) from error
