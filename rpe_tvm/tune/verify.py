"""`python -m rpe_tvm tuning verify`: every shipped record is found, replays, compiles and is right."""

from __future__ import annotations

import hashlib
import json
import tempfile
from pathlib import Path

from tvm.s_tir import Schedule

from rpe_tvm import targets
from rpe_tvm.build import records
from rpe_tvm.build.workloads import TUNED, TUNING_HEADS, function_of, tuning_workload
from rpe_tvm.plan import wisdom
from rpe_tvm.plan.config import AttentionConfig
from rpe_tvm.te import shapes
from rpe_tvm.tune import inputs
from rpe_tvm.tune.builder import build_schedules
from rpe_tvm.tune.measure import Contestant, measure


def main(logs: Path = wisdom.LOGS) -> int:
    """Verify all logs and print a line for each record.

    Logs of emulated boards are faulty as a whole. Hashes are compared with the manifest, the trace is replayed on the
    symbolic function, and on the CPU of the record the compiled function is compared with float64. Tables of GPUs have
    no traces. Returns the number of faulty records, at most 1.
    """
    faults = count = 0
    here = targets.detect().id
    for directory in sorted(path.parent for path in logs.glob("*/*/manifest.json")):
        target_id = directory.parent.name
        if wisdom.is_emulated(directory):
            print(f"{target_id} {directory.name}: measured on an emulated board, times mean nothing", flush=True)
            faults += 1
            continue
        hashes = json.loads((directory / "manifest.json").read_text(encoding="utf-8"))["files"]
        if _sha256(directory / "wisdom.json") != hashes.get("wisdom.json"):
            print(f"{target_id} wisdom.json: its SHA-256 is not the manifest's", flush=True)
            faults += 1
        for path in sorted(directory.glob("records/*.json")):
            kind, sha256 = TUNED[directory.name], hashes.get(str(path.relative_to(directory)))
            fault = _fault(path, kind, sha256, target_id, run=target_id == here)
            ran = "found, replays, right" if target_id == here else "found, replays (another CPU: not run)"
            print(f"{target_id} {path.stem}: {fault or ran}", flush=True)
            faults += bool(fault)
            count += 1
    print(f"{count} records, {faults} faulty")
    return min(faults, 1)


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _fault(path: Path, kind: type[AttentionConfig], sha256: str | None, target_id: str, run: bool) -> str:
    if _sha256(path) != sha256:
        return "its SHA-256 is not the manifest's"
    record = records.read(path, kind)
    config = record.config
    if records.find(config, target_id, tuning_workload) is None:
        return "not found: the workload's hash is another one; tune again"
    if config not in [entry.config for entry in wisdom.records(target_id, kind)]:  # type: ignore[arg-type]  # hashable
        return "the wisdom table names another config"
    sch = Schedule(function_of(config, shapes.symbolic()))
    record.replay(sch)
    if not run:
        return ""
    (library,) = build_schedules([sch], targets.to_tvm(targets.detect()), 1)
    if not isinstance(library, Path):
        return library
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "inputs.npz"
        inputs.save(config, TUNING_HEADS, file)
        (timing,) = measure([Contestant(library, file)], threads=2, seconds=0.0, timeout=600.0)
    return timing.failure
