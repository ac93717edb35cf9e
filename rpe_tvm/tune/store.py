"""Writes tuning logs: every file is written beside its place and renamed, so that none is ever half there."""

from __future__ import annotations

import hashlib
import json
import platform
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rpe_tvm.build import manifest
from rpe_tvm.build.files import write_json
from rpe_tvm.build.records import Record

FORMAT = 1


def read_json(path: Path) -> Any:
    """Read JSON, or return None if there is no such file."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def environment(target: str, threads: int) -> dict[str, Any]:
    """Return what a measurement depends on: device, threads, versions, commit, date."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent,
        check=False,
    ).stdout.strip()
    return {
        "device": cpu_name(),
        "threads": threads,
        "target": target,
        "versions": manifest.versions(),
        "commit": commit or "unknown",
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }


def cpu_name() -> str:
    """Return the CPU's name as the kernel gives it."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def publish(directory: Path, entry: Mapping[str, Any], record: Record, where: Mapping[str, Any]) -> None:
    """Add a finished length to the logs of a target: its record, the wisdom table and the manifest.

    Parameters
    ----------
    directory : Path
        As `plan.wisdom.directory`.
    entry : mapping
        Row of the wisdom table: config, ms, default_ms, rule_ms, candidates.
    record : Record
        The tuned schedule.
    where : mapping
        From `environment`.
    """
    write_json(directory / "records" / f"{record.config.name}.json", record.to_json())
    table = read_json(directory / "wisdom.json") or {"format": FORMAT, "entries": []}
    shape = ("length", "num_features", "head_dim")
    same = [entry["config"][key] for key in shape]
    entries = [e for e in table["entries"] if [e["config"][key] for key in shape] != same]
    entries.append(dict(entry))
    entries.sort(key=lambda e: (e["config"]["head_dim"], e["config"]["num_features"], e["config"]["length"]))
    write_json(directory / "wisdom.json", {"format": FORMAT, "entries": entries})
    files = sorted(path for path in directory.rglob("*.json") if path.name != "manifest.json")
    hashes = {str(p.relative_to(directory)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}
    write_json(directory / "manifest.json", {"format": FORMAT, "op": record.config.op, **where, "files": hashes})
