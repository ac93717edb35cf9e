"""The plan of the gradients takes what was measured, and has a rule for everything else."""

import json

from rpe_tvm.plan import backward, wisdom
from rpe_tvm.plan.backward import BackwardConfig


def test_a_measured_bucket_is_taken_as_it_is(tmp_path, monkeypatch):
    monkeypatch.setattr(wisdom, "LOGS", tmp_path)
    wisdom.records.cache_clear()
    odd = BackwardConfig(32, 64, 4096, "fft", (4, 4, 4), (8, 8), lanes=16)
    directory = tmp_path / "x86_64-invented" / "backward"
    directory.mkdir(parents=True)
    entry = {"config": odd.to_json(), "ms": 1.0, "default_ms": 2.0}
    (directory / "wisdom.json").write_text(json.dumps({"format": 1, "entries": [entry]}))
    assert backward.choose("x86_64-invented", 4000, 32, 64, 16) == odd
    for n, m, d in ((8192, 32, 64), (4096, 16, 64), (4096, 32, 32)):
        config = backward.choose("x86_64-invented", n, m, d, 16)
        assert config == backward.fft_rule("x86_64-invented", n, m, d, 16) and config.lanes == 16
    assert not wisdom.records("x86_64-invented")  # of attention
    wisdom.records.cache_clear()
