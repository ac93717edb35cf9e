"""MetaSchedule over the schedule of one config: evolutionary search with an XGBoost cost model, resumable."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType, ModuleType
from typing import Any

import tvm
from tvm.ir.utils import derived_object
from tvm.s_tir import meta_schedule as ms

from rpe_tvm.build.workloads import tuning_workload
from rpe_tvm.errors import TuningError
from rpe_tvm.plan.config import AttentionConfig
from rpe_tvm.schedules.of_machine import schedules_of
from rpe_tvm.tune.builder import local_builder
from rpe_tvm.tune.runner import CheckingRunner, Settings

BATCH = 4
# a failed candidate is stored with this time, in seconds
FAILED = 1e9

# (trials done, best seconds so far or None)
Progress = Callable[[int, "float | None"], None]


@derived_object
class _Watch(ms.measure_callback.PyMeasureCallback):  # type: ignore[misc]
    """Reports progress after each batch, keeps the first error, and ends the search when the time is up.

    It also ends it where `interrupts` is no longer empty.
    """

    def __init__(self, progress: Progress, deadline: float, interrupts: Sequence[int], done: int) -> None:
        super().__init__()
        self.progress, self.deadline, self.interrupts = progress, deadline, interrupts
        self.done = done
        self.best: float | None = None
        self.first_error = ""
        self.time_is_up = False

    def apply(
        self,
        task_scheduler: Any,
        task_id: int,
        measure_candidates: Any,
        builder_results: Any,
        runner_results: Any,
    ) -> None:
        for built, run in zip(builder_results, runner_results, strict=True):
            error = built.error_msg or run.error_msg
            if error and not self.first_error:
                self.first_error = str(error)
            if run.run_secs:
                seconds = min(float(s) for s in run.run_secs)
                self.best = seconds if self.best is None else min(self.best, seconds)
        self.done += len(builder_results)
        self.progress(self.done, self.best)
        if self.interrupts:
            raise KeyboardInterrupt
        if time.monotonic() > self.deadline:
            self.time_is_up = True
            raise RuntimeError("the time budget is spent")


def valid_records(database: Any) -> list[Any]:
    """Return the records of candidates that ran and were right, the fastest first."""

    def seconds(record: Any) -> float:
        return min(float(s) for s in record.run_secs) if record.run_secs else FAILED

    return sorted((r for r in database.get_all_tuning_records() if seconds(r) < FAILED), key=seconds)


def open_database(directory: Path) -> Any:
    """Open or make the database of one config; every measured batch is appended to its files at once."""
    directory.mkdir(parents=True, exist_ok=True)
    return ms.database.JSONDatabase(
        str(directory / "database_workload.json"), str(directory / "database_tuning_record.json")
    )


@contextmanager
def _noted_interrupts(noted: list[int]) -> Iterator[None]:
    """Add to the list when Ctrl-C is pressed, and raise KeyboardInterrupt from the second time on.

    An exception ends the process where TVM calls Python and expects none, so those who may raise one look at the list.
    """
    if threading.current_thread() is not threading.main_thread():  # Python interrupts the main thread only
        yield
        return
    before = signal.getsignal(signal.SIGINT)

    def note(number: int, _frame: FrameType | None) -> None:
        noted.append(number)
        if len(noted) > 1:
            raise KeyboardInterrupt
        os.write(2, b"\nCtrl-C: ending after this step; once more to end at once\n")  # print is not for handlers

    signal.signal(signal.SIGINT, note)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def _without_intrinsics() -> Iterator[None]:
    # A task context imports all tensor intrinsics, which takes 40 s; our schedules use none of them.
    name = "tvm.s_tir.tensor_intrin"
    if name in sys.modules:
        yield
        return
    sys.modules[name] = ModuleType(name)
    try:
        yield
    finally:
        del sys.modules[name]


def search(
    config: AttentionConfig,
    target: tvm.target.Target,
    directory: Path,
    *,
    machine: str,
    trials: int,
    seconds: float,
    settings: Settings,
    progress: Progress,
) -> list[Any]:
    """Tune the function of a config and return the valid records, the fastest first.

    Parameters
    ----------
    config : AttentionConfig
        What to tune.
    target : Target
        TVM's target, with `num-cores`.
    directory : Path
        Place of the database; trials that it already holds count.
    machine : str
        As of `TargetSpec.machine`: decides whose design space is searched, and how candidates are linked.
    trials, seconds : int, float
        Budget: the search ends with whichever is spent first.
    settings : Settings
        How candidates are timed.
    progress : callable
        Called after each batch.

    Raises
    ------
    TuningError
        If no candidate was valid, with the first build or run error; or if there is no place left to run them.
    """
    database = open_database(directory)
    left = trials - len(database)
    if left <= 0:
        return valid_records(database)
    logging.getLogger("tvm.s_tir.meta_schedule").setLevel(logging.WARNING)
    interrupted: list[int] = []
    watch = _Watch(progress, time.monotonic() + seconds, interrupted, len(database))
    cores = int(target.attrs["num-cores"])
    callbacks = [
        ms.measure_callback.AddToDatabase(),
        ms.measure_callback.UpdateCostModel(),
        ms.measure_callback.RemoveBuildArtifact(),
        watch,
    ]
    # Replaying the trace of a large function takes most of a second, so populations are small.
    strategy = ms.search_strategy.EvolutionarySearch(
        population_size=2 * BATCH, init_min_unmeasured=BATCH, genetic_num_iters=2, genetic_max_fail_count=2
    )
    space = ms.space_generator.ScheduleFn(
        lambda sch: schedules_of(machine).space(sch, config),
        sch_rules=[],
        postprocs=[],
        mutator_probs={ms.mutator.MutateTileSize(): 1.0},
    )
    # tune_tir would do the same and configure the logging of the whole process anew
    with _without_intrinsics():
        task = ms.TuneContext(
            mod=tuning_workload(config),
            target=target,
            space_generator=space,
            search_strategy=strategy,
            task_name="main",
            rand_state=1,
            num_threads=cores,
            logger=logging.getLogger(__name__),
        )
    runner = CheckingRunner(settings, interrupted)
    batch = min(max(BATCH, settings.place.jobs), left)
    try:
        with _noted_interrupts(interrupted):
            ms.tune.tune_tasks(
                tasks=[task],
                task_weights=[1.0],
                work_dir=str(directory),
                max_trials_global=left,
                num_trials_per_iter=batch,
                builder=local_builder(cores, machine),
                runner=runner,
                database=database,
                cost_model=ms.cost_model.XGBModel(num_warmup_samples=2 * BATCH, num_tuning_cores=cores, verbose_eval=0),
                measure_callbacks=callbacks,
            )
    except BaseException as error:
        # an exception that passes through TVM comes back as another object: only flags tell what it was
        if interrupted:
            raise KeyboardInterrupt from error
        if runner.stopped is not None:
            raise runner.stopped from error
        if not watch.time_is_up:
            raise
    if interrupted:  # after the last batch
        raise KeyboardInterrupt
    records = valid_records(database)
    if not records:
        raise TuningError(
            f"No candidate of {config.name} ({config.description}) was valid after {watch.done} trials. "
            f"First error: {watch.first_error or 'none was reported'}"
        )
    return records
