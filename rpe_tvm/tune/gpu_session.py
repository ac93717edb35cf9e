"""A tuning run for GPUs: candidates are compiled, here or elsewhere, then raced size by size on a GPU."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rpe_tvm.errors import TuningError
from rpe_tvm.files import write_json
from rpe_tvm.gpu_targets import GpuTargetSpec
from rpe_tvm.plan.gpu_wisdom import GpuConfig, config_from_json
from rpe_tvm.tune import store
from rpe_tvm.tune.gpu_candidates import Size, candidates, label
from rpe_tvm.tune.gpu_measure import HEADS, GpuLostError, Timing
from rpe_tvm.tune.gpu_place import GpuPlace, ThisGpu
from rpe_tvm.tune.gpu_work import Work, read_origin


@dataclass(frozen=True)
class Run:
    """What to tune, and with what budget.

    Parameters
    ----------
    target : GpuTargetSpec
        The GPU to compile for; a race takes one of the same architecture.
    sizes : tuple of Size
        Each is one race.
    seconds : float
        Of all races together, checks included; sizes that are left when they are over stay for --resume.
    workers : int
        Processes that compile.
    work : Work
        The work directory.
    logs : Path
        Directory of tuning logs that finished sizes are added to.
    place : GpuPlace
        Where to race.
    """

    target: GpuTargetSpec
    sizes: tuple[Size, ...]
    seconds: float
    workers: int
    work: Work
    logs: Path
    place: GpuPlace = field(default_factory=ThisGpu)


def build(run: Run) -> None:
    """Compile all candidates that are not there yet; prints a line for each.

    Raises
    ------
    BuildError
        If nvcc and the C++ compiler, or ld.lld for AMD GPUs, are missing. A candidate that does not compile is left
        out, and its reason kept.
    """
    # Not at the top: it imports what compiles, and the host of a race may have none of it.
    from rpe_tvm.tune.gpu_builder import build_candidates

    write_json(run.work.origin, store.origin())
    configs = {label(config): config for size in run.sizes for config in candidates(size, run.target.id)}

    def progress(done: int, total: int, name: str, failure: str) -> None:
        print(f"{done}/{total} {name}{': ' if failure else ''}{failure[:200]}", flush=True)

    build_candidates(configs.values(), run.target, run.work, run.workers, progress)


def race(run: Run, *, resume: bool) -> None:
    """Race the candidates of all sizes; every finished size is in `run.logs` at once.

    Raises
    ------
    TuningError
        If there is no GPU of the target's architecture, if the work directory holds results and `resume` is not set, or
        if a size has no valid candidate: with the first reason, after all other sizes.
    """
    where = _where(run)
    target_id = run.target.id
    if not resume and any(run.work.result(size, target_id).exists() for size in run.sizes):
        raise TuningError(
            f"{run.work.directory} holds results of an earlier race. Add --resume to go on with it, or give another "
            "--work-dir."
        )
    deadline = time.monotonic() + run.seconds
    failures: list[str] = []
    done: dict[Size, dict[str, Any]] = {}

    def publish(size: Size, entry: dict[str, Any]) -> None:
        done[size] = entry
        store.add_entry(run.logs / target_id / "attention", entry, where)

    left = []
    for size in run.sizes:
        known = store.read_json(run.work.result(size, target_id))
        publish(size, known) if known else left.append(size)
    for number, size in enumerate(left):
        seconds = deadline - time.monotonic()
        if seconds <= 0:
            print(f"Time is up: {len(left) - number} sizes are left for --resume.", flush=True)
            break
        try:
            entry = _race(run, size, seconds / (len(left) - number))
        except GpuLostError as error:
            run.work.refuse(_named(size, target_id, error.label), target_id, error.reason)
            raise
        except TuningError as error:
            failures.append(str(error))
            print(f"{size.name}: {error}", flush=True)
            continue
        write_json(run.work.result(size, target_id), entry)
        publish(size, entry)
    for entry in done.values():
        _print_choice(entry)
    if failures:
        raise TuningError(failures[0])
    if not done:
        raise TuningError(f"No size was raced within {run.seconds:.0f} seconds. Give more --seconds.")


def _where(run: Run) -> dict[str, Any]:
    """The manifest's account of the machine that races."""
    found = run.place.gpu(run.target.kind)
    if found.obstacle:
        raise TuningError(f"Cannot race: {found.obstacle}.")
    machine = found.machine
    if found.arch != run.target.arch:
        raise TuningError(
            f"Invalid GPU for {run.target.id}: expected {run.target.arch}, got {machine['name']}, {found.arch}. Build "
            f"and race with --target {found.arch}."
        )
    return {
        "device": machine["name"],
        "driver": machine["driver_version"],
        "torch": machine["torch"],
        "heads": HEADS,
        "target": run.target.to_json(),
        **read_origin(run.work),
    }


def _race(run: Run, size: Size, seconds: float) -> dict[str, Any]:
    """The row of the wisdom table of one size."""
    target_id = run.target.id
    configs = candidates(size, target_id)
    by_name = {label(config): config for config in configs}
    refused = {name: run.work.failure(config, target_id) for name, config in by_name.items()}
    artefacts = {name: run.work.artefact(config, target_id) for name, config in by_name.items() if not refused[name]}
    timings = run.place.measure(size, artefacts, seconds)
    refused.update({name: timing.failure for name, timing in timings.items()})
    refused = {name: reason for name, reason in refused.items() if reason}
    ranking = sorted((name for name in timings if not timings[name].failure), key=lambda name: timings[name].median)
    _print_race(size, ranking, timings, refused)
    if not ranking:
        name, reason = next(iter(refused.items()))
        raise TuningError(f"No candidate of {size.name} was valid. First error: {name}: {reason}")
    default = label(configs[0])
    if default in refused:
        raise TuningError(f"The rule's config of {size.name} was not valid: {default}: {refused[default]}")
    return {
        "dtype": size.dtype,
        "length": size.n,
        "config": by_name[ranking[0]].to_json(),
        "ms": _ms(timings[ranking[0]]),
        "default_ms": _ms(timings[default]),
        "rule": default,
        "candidates": [
            {"name": name, "ms": _ms(timings[name]), "error": float(f"{timings[name].error:.2e}")} for name in ranking
        ],
        "refused": [{"name": name, "reason": reason} for name, reason in refused.items()],
        "trials": len(by_name),
    }


def _named(size: Size, target_id: str, name: str) -> GpuConfig:
    return next(config for config in candidates(size, target_id) if label(config) == name)


def _ms(timing: Timing) -> float:
    return round(1e3 * timing.median, 5)


def _print_race(size: Size, ranking: list[str], timings: dict[str, Timing], refused: dict[str, str]) -> None:
    print(f"{size.name}: {len(ranking)} candidates, {len(refused)} refused")
    for name in ranking:
        print(f"  {_ms(timings[name]):10.4f} ms  error {timings[name].error:.1e}  {name}")
    for name, reason in refused.items():
        print(f"  refused: {name}: {reason[:160]}", flush=True)


def _print_choice(entry: dict[str, Any]) -> None:
    config = config_from_json(entry["config"])
    gain = entry["default_ms"] / entry["ms"]
    print(
        f"{entry['dtype']} m={config.num_features} d={config.head_dim} n={entry['length']}: {label(config)} "
        f"{entry['ms']:.4f} ms; rule {entry['rule']} {entry['default_ms']:.4f} ms ({gain:.2f}x)",
        flush=True,
    )
