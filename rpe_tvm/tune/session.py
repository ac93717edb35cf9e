"""A tuning run: for each length and number of features, the best config, then the best schedule of it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tvm
from tqdm import tqdm
from tvm.s_tir import Schedule

from rpe_tvm.build import records
from rpe_tvm.build.workloads import TUNED, TUNING_HEADS, tuning_workload
from rpe_tvm.errors import TuningError
from rpe_tvm.files import write_json
from rpe_tvm.plan.buckets import bucket_length
from rpe_tvm.plan.config import AttentionConfig
from rpe_tvm.schedules.of_machine import schedules_of
from rpe_tvm.targets import TargetSpec, to_tvm
from rpe_tvm.tune import inputs, store
from rpe_tvm.tune.builder import build_schedules
from rpe_tvm.tune.candidates import candidates, is_tuned, rule
from rpe_tvm.tune.measure import Contestant, Timing
from rpe_tvm.tune.place import Place, ThisMachine
from rpe_tvm.tune.runner import Settings
from rpe_tvm.tune.search import search

FINALISTS = 3
# measuring time of each entrant of a race
RACE_SECONDS = 2.0
MEASURE_TIMEOUT = 600.0


@dataclass(frozen=True)
class Run:
    """What to tune, and with what budget.

    Parameters
    ----------
    op : {"attention", "backward"}
        The operator.
    target : TargetSpec
        The CPU to compile for.
    lengths, features : tuple of int
        Sequence lengths (their buckets are tuned) and numbers of features m; all pairs.
    head_dim : int
        Channels d.
    trials, seconds : int, float
        Budget of MetaSchedule for each pair: the search ends with whichever is spent first.
    threads : int
        OpenMP threads that candidates are timed with.
    work_dir : Path
        Databases and intermediate results; a run that was interrupted goes on from there.
    logs : Path
        Directory of tuning logs that finished pairs are added to.
    timeout : float
        Seconds after which a candidate of MetaSchedule counts as failed.
    place : Place
        Where candidates run.
    """

    op: str
    target: TargetSpec
    lengths: tuple[int, ...]
    features: tuple[int, ...]
    head_dim: int
    trials: int
    seconds: float
    threads: int
    work_dir: Path
    logs: Path
    timeout: float = 60.0
    place: Place = field(default_factory=ThisMachine)

    @property
    def log(self) -> Path:
        """Directory of the logs of this target and operator."""
        return self.logs / self.target.id / self.op

    @property
    def pairs(self) -> list[tuple[int, int]]:
        """All (bucket length, features) that are tuned, short ones first."""
        pairs = [(n, m) for n in sorted({bucket_length(n) for n in self.lengths}) for m in self.features]
        return [(n, m) for n, m in pairs if is_tuned(self.op, self.target, n, m, self.head_dim)]


def tvm_target(run: Run) -> tvm.target.Target:
    """Return TVM's target with the number of cores, without which MetaSchedule does not start."""
    return tvm.target.Target({**to_tvm(run.target).export(), "num-cores": run.threads})


def tune(run: Run, *, resume: bool) -> None:
    """Tune all pairs; every finished one is in `run.logs` at once.

    Raises
    ------
    TuningError
        If no length is tuned; if the work directory holds another run's results and `resume` is not set, or another
        device's; if the logs are no place for what this device measures; if a pair has no valid candidate, or there is
        no place left to run them.
    """
    store.check(run.log, run.place.device)
    if not run.pairs:
        raise TuningError(
            f"Expected lengths whose {run.op} runs by FFT, got {', '.join(map(str, run.lengths))}: so short ones run "
            "by tiles, which are not tuned. Give longer --lengths."
        )
    directory = run.work_dir / run.target.id / run.op
    if directory.exists() and not resume:
        raise TuningError(
            f"{directory} holds results of an earlier run. Add --resume to go on with it, or give another --work-dir."
        )
    _check_device(directory / "device.json", run.place.device)
    with tqdm(run.pairs, unit="length", dynamic_ncols=True) as bar:
        for length, num_features in bar:
            bar.set_description(f"n={length} m={num_features}")
            place = directory / f"n{length}-m{num_features}-d{run.head_dim}"
            result = store.read_json(place / "result.json")
            if result is None:
                result = _tune_pair(run, length, num_features, place, bar)
                write_json(place / "result.json", result)
            _publish(run, result)
            entry = result["entry"]
            tqdm.write(
                f"n={length} m={num_features}: {TUNED[run.op].from_json(entry['config']).description} "
                f"{entry['ms']:.2f} ms; default schedule {entry['default_ms']:.2f} ms, "
                f"rule {entry['rule_ms']:.2f} ms, {result['trials']} trials"
            )


def _check_device(path: Path, device: Mapping[str, Any]) -> None:
    """Write or compare what the results of a work directory were measured on."""
    before = store.read_json(path)
    if before is not None and before != device:
        raise TuningError(
            f"{path.parent} holds results of {before['device']}, and this run is on {device['device']}: their times do "
            "not compare. Give another --work-dir."
        )
    write_json(path, device)


def _publish(run: Run, result: dict[str, Any]) -> None:
    record = records.from_json(result["record"], TUNED[run.op])
    store.publish(run.log, result["entry"], record, result["where"])


def _save_inputs(config: AttentionConfig, place: Path) -> Path:
    path = place / f"{config.description.replace(' ', '-')}-l{config.lanes}.npz"
    if not path.exists():
        staging = path.with_name(f"staging-{path.name}")
        inputs.save(config, TUNING_HEADS, staging)
        staging.rename(path)
    return path


def _default(run: Run, config: AttentionConfig) -> Schedule:
    sch = Schedule(tuning_workload(config))
    schedules_of(run.target.machine).default(sch, config)
    return sch


def _race(
    run: Run, entrants: list[tuple[AttentionConfig, Schedule]], place: Path
) -> list[tuple[AttentionConfig, Schedule, Timing]]:
    """Build and time scheduled configs in turns; return the valid ones in the order given."""
    built = build_schedules([sch for _, sch in entrants], tvm_target(run), run.threads, run.target.machine)
    libraries = [library for library in built if isinstance(library, Path)]
    ready = [(config, sch) for (config, sch), path in zip(entrants, built, strict=True) if isinstance(path, Path)]
    contestants = [
        Contestant(library, _save_inputs(config, place)) for library, (config, _) in zip(libraries, ready, strict=True)
    ]
    timings = run.place.measure(contestants, run.threads, RACE_SECONDS, MEASURE_TIMEOUT)
    for library in libraries:
        shutil.rmtree(library.parent, ignore_errors=True)
    valid = [(*entrant, timing) for entrant, timing in zip(ready, timings, strict=True) if not timing.failure]
    if not valid:
        errors = [str(error) for error in built if not isinstance(error, Path)] + [t.failure for t in timings]
        raise TuningError(f"No candidate of {place.name} was valid. First error: {errors[0]}")
    return valid


def _tune_pair(run: Run, length: int, num_features: int, place: Path, bar: Any) -> dict[str, Any]:
    place.mkdir(parents=True, exist_ok=True)
    best, screened = _screen(run, length, num_features, place, bar)
    settings = Settings(_save_inputs(best, place), run.threads, timeout=run.timeout, place=run.place)
    default_ms = next(ms for config, ms in screened if config == best)

    def progress(done: int, seconds: float | None) -> None:
        found = "none yet" if seconds is None else f"{1e3 * seconds:.2f} ms"
        bar.set_postfix_str(f"{best.description}: trial {done}/{run.trials}, best {found}, default {default_ms:.2f} ms")

    found = search(
        best,
        tvm_target(run),
        place / "database",
        machine=run.target.machine,
        trials=run.trials,
        seconds=run.seconds,
        settings=settings,
        progress=progress,
    )
    bar.set_postfix_str(f"{best.description}: finalists")
    ruled = rule(run.op, run.target, length, num_features, run.head_dim)
    entrants = [(ruled, _default(run, ruled)), (best, _default(run, best)), *_finalists(best, found)]
    times = _race(run, entrants, place)
    rule_ms, default_ms = (1e3 * timing.best for _, _, timing in times[:2])
    # over all of them: where the screening was misled by noise, the rule's config can still win
    config, winner, timing = min(times, key=lambda entrant: entrant[2].best)
    if config != best:
        default_ms = rule_ms
    for path in place.glob("*.npz"):
        path.unlink()
    return {
        "entry": {
            "config": config.to_json(),
            "ms": round(1e3 * timing.best, 4),
            "default_ms": round(default_ms, 4),
            "rule_ms": round(rule_ms, 4),
            "rule": ruled.description,
            "candidates": [
                {"description": config.description, "lanes": config.lanes, "default_ms": round(ms, 4)}
                for config, ms in screened
            ],
        },
        "record": _record(run, config, winner, timing, len(found)).to_json(),
        "trials": len(found),
        "where": _where(run),
    }


def _screen(
    run: Run, length: int, num_features: int, place: Path, bar: Any
) -> tuple[AttentionConfig, list[tuple[AttentionConfig, float]]]:
    """Time all candidate configs on their default schedule; return the best one and all times in ms."""
    known = store.read_json(place / "screen.json")
    if known is None:
        configs = candidates(run.op, run.target, length, num_features, run.head_dim)
        bar.set_postfix_str(f"{len(configs)} candidates on the default schedule")
        times = _race(run, [(config, _default(run, config)) for config in configs], place)
        known = [[config.to_json(), 1e3 * timing.best] for config, _, timing in times]
        write_json(place / "screen.json", known)
    screened = [(TUNED[run.op].from_json(fields), float(ms)) for fields, ms in known]
    return min(screened, key=lambda item: item[1])[0], screened


def _finalists(config: AttentionConfig, found: list[Any]) -> Iterator[tuple[AttentionConfig, Schedule]]:
    for record in found[:FINALISTS]:
        sch = Schedule(tuning_workload(config))
        record.trace.apply_to_schedule(sch, remove_postproc=False)
        yield config, sch


def _where(run: Run) -> dict[str, Any]:
    return store.environment(run.place.device, str(to_tvm(run.target)), run.threads)


def _record(run: Run, config: AttentionConfig, sch: Schedule, timing: Timing, trials: int) -> records.Record:
    workload = tuning_workload(config)
    provenance = {**_where(run), "trials": trials}
    return records.Record(
        config,
        records.workload_hash(workload),
        records.record_json(sch, workload, timing.seconds),
        provenance,
    )
