"""Tuned records: MetaSchedule's trace of the best candidate for one config, found by name and checked by hash."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tvm
import tvm_ffi
from tvm.s_tir import Schedule
from tvm.s_tir import meta_schedule as ms

from rpe_tvm.errors import TuningError
from rpe_tvm.plan import wisdom
from rpe_tvm.plan.config import AttentionConfig


@dataclass(frozen=True)
class Record:
    """A tuned schedule.

    Parameters
    ----------
    config : AttentionConfig
        What was tuned.
    workload_hash : str
        Structural hash of the static workload: another version of our tensor expressions has another one.
    record : list
        MetaSchedule's own JSON of the tuning record: trace, seconds, target, arguments.
    provenance : mapping
        Where it comes from: device, versions, trials, commit.
    """

    config: AttentionConfig
    workload_hash: str
    record: list[Any]
    provenance: Mapping[str, Any]

    def replay(self, sch: Schedule) -> None:
        """Apply the recorded schedule to the same function of any sizes.

        Raises
        ------
        TuningError
            If an instruction does not apply.
        """
        workload = ms.database.Workload(sch.mod)
        try:
            tuned = ms.database.TuningRecord.from_json(self.record, workload)
            tuned.trace.apply_to_schedule(sch, remove_postproc=False)
        except (tvm.error.InternalError, tvm.s_tir.ScheduleError, RuntimeError, ValueError) as error:
            raise TuningError(
                f"The tuned record of {self.config.name} does not replay: {error}. Tune again (docs/tuning.md)."
            ) from error

    def to_json(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        return {
            "config": self.config.to_json(),
            "workload_hash": self.workload_hash,
            "record": self.record,
            "provenance": dict(self.provenance),
        }


def path_of(config: AttentionConfig, target_id: str) -> Path:
    """Return the file of a config's record."""
    return wisdom.directory(target_id, config.op) / "records" / f"{config.name}.json"


def from_json(fields: Mapping[str, Any], kind: type[AttentionConfig]) -> Record:
    """Return the record that `Record.to_json` wrote; `kind` is the class of its config."""
    return Record(
        kind.from_json(fields["config"]),
        fields["workload_hash"],
        fields["record"],
        fields["provenance"],
    )


def read(path: Path, kind: type[AttentionConfig]) -> Record:
    """Read one record."""
    return from_json(json.loads(path.read_text(encoding="utf-8")), kind)


def workload_hash(function: tvm.tirx.PrimFunc) -> str:
    """Return the structural hash by which a record belongs to a workload."""
    return f"{tvm_ffi.structural_hash(function) & (2**64 - 1):016x}"


def find(
    config: AttentionConfig, target_id: str, make_workload: Callable[[AttentionConfig], tvm.tirx.PrimFunc]
) -> Record | None:
    """Return the shipped record of this config, target and workload, or None.

    Raises
    ------
    TuningError
        If an emulator measured it.
    """
    path = path_of(config, target_id)
    if not path.exists():
        return None
    wisdom.refuse_emulated(wisdom.directory(target_id, config.op))
    record = read(path, type(config))
    if record.config != config or record.workload_hash != workload_hash(make_workload(config)):
        return None
    return record


def record_json(sch: Schedule, workload: tvm.tirx.PrimFunc, seconds: Sequence[float]) -> list[Any]:
    """Return MetaSchedule's JSON of a tuning record for a schedule of `workload` and its measured seconds."""
    holder = ms.database.Workload(tvm.IRModule({"main": workload}))
    record = ms.database.TuningRecord(sch.trace, holder, list(seconds), None, None)
    plain: list[Any] = _plain(record.as_json())
    return plain


def _plain(value: Any) -> Any:
    """Return FFI containers as lists and dicts."""
    if isinstance(value, tvm_ffi.Array):
        return [_plain(item) for item in value]
    if isinstance(value, tvm_ffi.Map):
        return {str(key): _plain(item) for key, item in value.items()}
    return str(value) if isinstance(value, str) else value
