"""Writes tuning logs: every file is written beside its place and renamed, so that none is ever half there."""

from __future__ import annotations

import hashlib
import json
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rpe_tvm.errors import TuningError
from rpe_tvm.files import write_json
from rpe_tvm.plan import wisdom

if TYPE_CHECKING:
    from rpe_tvm.build.records import Record

FORMAT = 1


def read_json(path: Path) -> Any:
    """Read JSON, or return None if there is no such file."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def origin() -> dict[str, Any]:
    """Return what compiled code depends on: versions, commit, date."""
    from rpe_tvm.build import manifest  # needs TVM, which the host of a race on a GPU may not have

    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent,
        check=False,
    ).stdout.strip()
    return {
        "versions": manifest.versions(),
        "commit": commit or "unknown",
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }


def environment(device: Mapping[str, Any], target: str, threads: int) -> dict[str, Any]:
    """Return what a measurement on a CPU depends on: device (as of `Place`), threads, versions, commit, date."""
    return {**device, "threads": threads, "target": target, **origin()}


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

    Raises
    ------
    TuningError
        As `check`.
    """
    check(directory, where)
    write_json(directory / "records" / f"{record.config.name}.json", record.to_json())
    add_entry(directory, entry, where)


def check(directory: Path, device: Mapping[str, Any]) -> None:
    """Refuse to add what an emulator measured to the package's logs or to those of hardware, and the other way round.

    Raises
    ------
    TuningError
        If `directory` is no place for results of `device`.
    """
    is_emulated = bool(device.get(wisdom.EMULATED))
    if is_emulated and directory.resolve().is_relative_to(wisdom.LOGS.resolve()):
        raise TuningError(
            f"{device['device']}: times of an emulator mean nothing and never go to {wisdom.LOGS}. Give another "
            "directory: --logs DIR."
        )
    manifest = read_json(directory / "manifest.json")
    if manifest is not None and wisdom.is_emulated(directory) != is_emulated:
        raise TuningError(
            f"{directory} holds logs of {manifest['device']}, to which those of {device['device']} cannot be added: "
            "one is emulated, the other is not. Give another directory: --logs DIR."
        )


def add_entry(directory: Path, entry: Mapping[str, Any], where: Mapping[str, Any]) -> None:
    """Add a row to a target's wisdom table, in the place of one of the same sizes and dtype, and hash all files."""
    table = read_json(directory / "wisdom.json") or {"format": FORMAT, "entries": []}
    entries = sorted([*(e for e in table["entries"] if _place(e) != _place(entry)), dict(entry)], key=_place)
    write_json(directory / "wisdom.json", {"format": FORMAT, "entries": entries})
    files = sorted(path for path in directory.rglob("*.json") if path.name != "manifest.json")
    hashes = {str(p.relative_to(directory)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}
    write_json(directory / "manifest.json", {"format": FORMAT, "op": directory.name, **where, "files": hashes})


def _place(entry: Mapping[str, Any]) -> tuple[str, int, int, int]:
    """By what rows of a wisdom table are told apart, and in which order they stand."""
    config = entry["config"]
    length = entry.get("length", config["length"])  # of a GPU's row; the FFT's bucket may be a longer one
    return entry.get("dtype", ""), config["head_dim"], config["num_features"], length
