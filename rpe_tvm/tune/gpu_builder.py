"""Compiles candidates for GPUs in processes of their own, as artefacts of one work directory; needs no GPU."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace

from rpe_tvm.build import compile as compiling
from rpe_tvm.build import cuda
from rpe_tvm.errors import BuildError, TuningError
from rpe_tvm.gpu_targets import GpuTargetSpec
from rpe_tvm.plan.gpu_wisdom import GpuConfig
from rpe_tvm.tune.gpu_candidates import label
from rpe_tvm.tune.gpu_work import NOT_BUILT, Work

# (candidates done, of how many, the last one's name, why it failed or "")
Progress = Callable[[int, int, str, str], None]


def build_candidates(
    configs: Iterable[GpuConfig], target: GpuTargetSpec, work: Work, workers: int, progress: Progress
) -> None:
    """Compile what is not there yet; a candidate that does not compile leaves its reason.

    Parameters
    ----------
    configs : iterable of config
        What to compile.
    target : GpuTargetSpec
        Machine code is made for its own architecture only: candidates are raced, not shipped.
    work : Work
        Where to put artefacts; TVM's libraries that run those of NVIDIA's are copied beside them.
    workers : int
        Processes.
    progress : callable
        Called after each candidate.

    Raises
    ------
    TuningError
        If a process is killed.
    """
    target = replace(target, architectures=(target.arch,))
    if target.kind == "cuda":
        cuda.pack_runtime(work.artefacts)
    missing = {label(config): config for config in configs if work.failure(config, target.id) == NOT_BUILT}
    # spawned: a forked process inherits locks of the threads of TVM and torch
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        tasks = {pool.submit(_build, config, target, work): name for name, config in missing.items()}
        try:
            for done, task in enumerate(as_completed(tasks), 1):
                progress(done, len(tasks), tasks[task], task.result())
        except BrokenProcessPool as error:
            raise TuningError(
                "A process that compiles was ended from outside, perhaps for want of memory. What is compiled is kept: "
                "run the same command again, with fewer --workers."
            ) from error
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _build(config: GpuConfig, target: GpuTargetSpec, work: Work) -> str:
    """Compile one candidate; returns why it failed, or ""."""
    try:
        artefact = compiling.compile_operator(config, target)
        compiling.copy_artefact(artefact, work.artefact(config, target.id))
    except BuildError as error:
        reason = " ".join(str(error).split())
        work.note_failure(config, target.id, reason)
        return reason
    return ""
