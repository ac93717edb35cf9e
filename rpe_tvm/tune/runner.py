"""MetaSchedule's runner over `tune.measure`: checks each candidate's numbers before it times it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tvm.ir.utils import derived_object
from tvm.s_tir import meta_schedule as ms

from rpe_tvm.tune.measure import Contestant, measure


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
    """

    inputs: Path
    threads: int
    seconds: float = 0.5
    timeout: float = 60.0


@derived_object
class _Done(ms.runner.PyRunnerFuture):  # type: ignore[misc]
    """A result that is already there: candidates are timed one after the other."""

    def __init__(self, result: ms.runner.RunnerResult) -> None:
        super().__init__()
        self._result = result

    def done(self) -> bool:
        return True

    def result(self) -> ms.runner.RunnerResult:
        return self._result


@derived_object
class CheckingRunner(ms.runner.PyRunner):  # type: ignore[misc]
    """Runs candidates in processes of their own; a wrong result is an error, never a record."""

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        self.settings = settings

    def run(self, runner_inputs: list[Any]) -> list[Any]:
        return [_Done(self._result(str(candidate.artifact_path))) for candidate in runner_inputs]

    def _result(self, library: str) -> ms.runner.RunnerResult:
        settings = self.settings
        contestant = Contestant(Path(library), settings.inputs)
        (timing,) = measure([contestant], settings.threads, settings.seconds, settings.timeout)
        if timing.failure:
            return ms.runner.RunnerResult(None, timing.failure)
        return ms.runner.RunnerResult([timing.best], None)
