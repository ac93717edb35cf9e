"""Every record that is shipped belongs to the present tensor expressions, and replays on symbolic sizes."""

import hashlib
import json

import pytest
from tvm.s_tir import Schedule

from rpe_tvm.build import records
from rpe_tvm.build.workloads import TUNED, function_of, tuning_workload
from rpe_tvm.plan import wisdom
from rpe_tvm.te import shapes

PATHS = sorted(wisdom.LOGS.glob("*/*/records/*.json"))


def read(path):
    return records.read(path, TUNED[path.parents[1].name])


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_a_record_is_found(path):
    target_id = path.parents[2].name
    record = read(path)
    assert records.find(record.config, target_id, tuning_workload) == record
    assert record.config in [entry.config for entry in wisdom.records(target_id, type(record.config))]
    hashes = json.loads((path.parents[1] / "manifest.json").read_text(encoding="utf-8"))["files"]
    assert hashes[f"records/{path.name}"] == hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("op", sorted({path.parents[1].name for path in PATHS}))
def test_a_record_replays(op):
    """The other records too, and compiled: `python -m rpe_tvm tuning verify`."""
    record = read([path for path in PATHS if path.parents[1].name == op][-1])
    sch = Schedule(function_of(record.config, shapes.symbolic()))
    before = sch.mod.script()
    record.replay(sch)
    assert sch.mod.script() != before
