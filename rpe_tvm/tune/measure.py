"""Times compiled functions in a process of its own: `python -m rpe_tvm.tune.measure JOB.json`.

A process of its own, because a bad candidate may crash, and without tvm, because that is how libraries are used. The
job names libraries with files of `tune.inputs`, threads and seconds; the answer is one JSON line on standard output.
"""

from __future__ import annotations

import functools
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# of a board, over RPC; on this machine turns are shorter, so that slow spells of it meet every library
ROUNDS, TURNS = 5, 10


@dataclass(frozen=True)
class Timing:
    """What came of one library: seconds of a call (one per turn), its error, or why there is none."""

    seconds: tuple[float, ...]
    error: float
    failure: str = ""

    @property
    def best(self) -> float:
        """The smallest time of a turn: noise only adds."""
        return min(self.seconds)


@dataclass(frozen=True)
class Contestant:
    """A compiled function and the file of `tune.inputs` with its arguments."""

    library: Path
    inputs: Path


def measure(contestants: Sequence[Contestant], threads: int, seconds: float, timeout: float) -> list[Timing]:
    """Check and time the function `main` of each library, in turns, A B A B.

    Parameters
    ----------
    contestants : sequence of Contestant
        What to time.
    threads : int
        OpenMP threads.
    seconds : float
        Time for each library.
    timeout : float
        Seconds after which the process is killed.
    """
    pairs = [[str(contestant.library), str(contestant.inputs)] for contestant in contestants]
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump({"contestants": pairs, "threads": threads, "seconds": seconds}, file)
        file.flush()
        command = [sys.executable, "-m", "rpe_tvm.tune.measure", file.name]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)
        except subprocess.TimeoutExpired:
            return [Timing((), 0.0, f"no answer within {timeout:.0f} s")] * len(pairs)
    if done.returncode != 0:
        reason = done.stderr.strip().splitlines()[-1:] or [f"the process ended with status {done.returncode}"]
        return [Timing((), 0.0, reason[0])] * len(pairs)
    return [Timing(tuple(t["seconds"]), t["error"], t["failure"]) for t in json.loads(done.stdout.splitlines()[-1])]


def _main(job: dict[str, Any]) -> list[dict[str, Any]]:
    # tvm_ffi imports torch where it is installed, which takes seconds
    sys.modules["torch"] = None  # type: ignore[assignment]
    import ctypes

    import numpy as np
    import tvm_ffi

    from rpe_tvm.runtime.operator import aligned_empty
    from rpe_tvm.tune.case import Case

    ctypes.CDLL("libgomp.so.1").omp_set_num_threads(job["threads"])

    def aligned(array: Any) -> Any:
        copy = aligned_empty(array.shape)
        copy[...] = array
        return copy

    cases = {path: Case.load(Path(path)) for path in {inputs for _, inputs in job["contestants"]}}
    arguments = {path: [aligned(each) for each in case.arguments] for path, case in cases.items()}
    calls: list[Callable[[], Any]] = []
    answers: list[dict[str, Any]] = []
    for library, inputs in job["contestants"]:
        function, arrays, case = tvm_ffi.load_module(library)["main"], arguments[inputs], cases[inputs]
        outputs = [aligned_empty(output.shape) for output in case.outputs]
        for output in outputs:
            output[...] = np.nan
        call = functools.partial(function, *arrays, *outputs)
        call()
        error, failure = case.check(outputs)
        calls.append(call)
        answers.append({"seconds": [], "error": error, "failure": failure})
    for _ in range(TURNS if job["seconds"] else 1):
        for timed, answer in zip(calls, answers, strict=True):
            if answer["failure"]:
                continue
            best, start = float("inf"), time.perf_counter()
            while True:
                before = time.perf_counter()
                timed()
                now = time.perf_counter()
                best = min(best, now - before)
                if now - start > job["seconds"] / TURNS:
                    break
            answer["seconds"].append(best)
    return answers


if __name__ == "__main__":
    print(json.dumps(_main(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))))
