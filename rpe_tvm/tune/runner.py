"""MetaSchedule's runner over a `Place`: each candidate's numbers are checked before it is timed."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tvm.ir.utils import derived_object
from tvm.s_tir import meta_schedule as ms

from rpe_tvm.errors import RpeTvmError
from rpe_tvm.tune.measure import Contestant
from rpe_tvm.tune.place import Place, ThisMachine


@dataclass(frozen=True)
class Settings:
    """How candidates are timed.

    Parameters
    ----------
    inputs : Path
        File of `tune.inputs`.
    threads : int
        OpenMP threads.
    seconds : float
        Measuring time of one candidate.
    timeout : float
        Seconds after which a candidate counts as failed.
    place : Place
        Where they run.
    """

    inputs: Path
    threads: int
    seconds: float = 0.5
    timeout: float = 60.0
    place: Place = field(default_factory=ThisMachine)


@derived_object
class _Done(ms.runner.PyRunnerFuture):  # type: ignore[misc]
    """A result that is already there: a batch is timed as a whole."""

    def __init__(self, result: ms.runner.RunnerResult) -> None:
        super().__init__()
        self._result = result

    def done(self) -> bool:
        return True

    def result(self) -> ms.runner.RunnerResult:
        return self._result


@derived_object
class CheckingRunner(ms.runner.PyRunner):  # type: ignore[misc]
    """Runs candidates in processes of their own; a wrong result is an error, never a record.

    Where there is no place left to run them, `stopped` holds the reason, and nothing of the batch counts as tried; nor
    does it where `interrupts`, which Ctrl-C fills, is not empty before or after.
    """

    def __init__(self, settings: Settings, interrupts: Sequence[int] = ()) -> None:
        super().__init__()
        self.settings, self.interrupts = settings, interrupts
        self.stopped: RpeTvmError | None = None

    def run(self, runner_inputs: list[Any]) -> list[Any]:
        self._raise_interrupt()
        libraries = [str(candidate.artifact_path) for candidate in runner_inputs]
        pool = ThreadPoolExecutor(self.settings.place.jobs)
        try:
            results = [_Done(result) for result in pool.map(self._result, libraries)]
        except RpeTvmError as error:
            self.stopped = error
            raise
        finally:
            pool.shutdown(cancel_futures=True)
        self._raise_interrupt()  # it may have ended the candidates' processes, too
        return results

    def _raise_interrupt(self) -> None:
        if self.interrupts:
            raise KeyboardInterrupt

    def _result(self, library: str) -> ms.runner.RunnerResult:
        settings = self.settings
        contestant = Contestant(Path(library), settings.inputs)
        (timing,) = settings.place.measure([contestant], settings.threads, settings.seconds, settings.timeout)
        if timing.failure:
            return ms.runner.RunnerResult(None, timing.failure)
        return ms.runner.RunnerResult([timing.best], None)
