"""Where no board measured, cycles counted in compiled code decide: tables are shipped, nothing is compiled for it."""

import itertools
import json
import math

import pytest

from rpe_tvm import arm_targets
from rpe_tvm.plan import backward, static_rates, toeplitz, wisdom
from rpe_tvm.plan.buckets import neighbours
from rpe_tvm.plan.config import AttentionConfig
from rpe_tvm.plan.static_rates import Rates

ARM = sorted({f"{machine}-{mcpu}" for machine, mcpu in arm_targets.PRESETS.values()})


def equal(cycles, count=1.0, **other):
    """Rates at which every stage takes the same, but for some."""
    stage = dict.fromkeys((2, 3, 4, 5, 8), cycles)
    fields = {name: stage for name in ("forward", "backward", "split", "unsplit", "turn")}
    none = {name: dict.fromkeys(stage, 0.0) for name in fields}
    return Rates(count, count, **{**fields, **other}, weights=0.0, spills=none)


@pytest.mark.parametrize("target_id", ARM)
def test_every_arm_target_has_a_table_that_is_not_called_tuned(target_id):
    table = json.loads(static_rates.path_of(target_id).read_text(encoding="utf-8"))
    assert table["source"] == "static" and "not measured" in table["note"] and table["made_by"].startswith("python ")
    assert set(table["versions"]) >= {"apache-tvm", "rpe_tvm"}
    rates = Rates.from_json(table["rates"])
    assert Rates.from_json(json.loads(json.dumps(rates.to_json()))) == rates == static_rates.rates(target_id)
    radices = {2, 3, 4, 5} | ({8} if wisdom.largest_radix(target_id, 4) == 8 else set())
    for kind in ("forward", "backward", "split", "unsplit", "turn"):
        assert set(getattr(rates, kind)) == set(rates.spills[kind]) == radices
        assert min(getattr(rates, kind).values()) > 0


def test_a_cpu_without_a_table_takes_that_of_its_machine():
    assert static_rates.rates("aarch64-cortex-a57") == static_rates.rates("aarch64-generic")
    assert static_rates.rates("armv7-cortex-a15") == static_rates.rates("armv7-cortex-a7")
    assert static_rates.rates("x86_64-znver4") is None and static_rates.rates("cuda-sm_90") is None
    assert static_rates.targets() == ARM


@pytest.mark.parametrize("target_id", ARM)
def test_the_plan_takes_the_fewest_cycles(target_id):
    rates = static_rates.rates(target_id)
    for length, m, d in itertools.product(neighbours(64, 8192), (8, 32, 64), (40, 64)):
        config = wisdom.choose(target_id, length, m, d, 4)
        halves = rates.best_halves(length)
        direct, fft = rates.direct(length, m, d, 4), rates.fft(halves, m, d, 4)
        assert config.algorithm == ("direct" if direct <= fft else "fft")
        if config.algorithm == "fft":
            assert (config.outer, config.inner) == halves
        assert toeplitz.choose(target_id, length, d, 4).inner == halves[1]
        if length > backward.direct_config(target_id, m, d, 4).length:
            assert backward.choose(target_id, length, m, d, 4).outer == halves[0]


def test_a_measured_record_is_taken_before_a_table(tmp_path, monkeypatch):
    odd = AttentionConfig(32, 64, 4096, "direct", tile=(32, 64), lanes=4)
    assert wisdom.choose("aarch64-cortex-a72", 4096, 32, 64, 4).algorithm == "fft"
    entry = {"config": odd.to_json(), "ms": 1.0, "default_ms": 2.0}
    logs = tmp_path / "aarch64-cortex-a72" / "attention"
    logs.mkdir(parents=True)
    (logs / "wisdom.json").write_text(json.dumps({"format": 1, "entries": [entry]}))
    monkeypatch.setattr(wisdom, "LOGS", tmp_path)
    wisdom.records.cache_clear()
    assert wisdom.choose("aarch64-cortex-a72", 4096, 32, 64, 4) == odd
    assert wisdom.choose("aarch64-cortex-a72", 4096, 16, 64, 4).algorithm == "fft"  # the table, for what is not there
    wisdom.records.cache_clear()


def test_factorisations_follow_the_cycles():
    turn = dict.fromkeys((2, 3, 4, 8), 1.0) | {5: 9.0}
    assert equal(1.0, turn=turn).best_halves(400)[1][-1] == 4  # 20 by 20 points, and rows do not end with 5
    split = dict.fromkeys((2, 3, 4, 5, 8), 1.0) | {8: 9.0}
    outer, inner = equal(1.0, split=split).best_halves(4096)
    assert outer[-1] != 8 and math.prod(outer) * math.prod(inner) == 4096
    assert equal(1.0).best_halves(4096) == ((8, 8), (8, 8))
    with pytest.raises(ValueError, match="Invalid length: expected a product of .*, got 77"):
        equal(1.0).best_halves(77)


def test_spills_decide_where_cycles_do_not():
    spills = {name: dict.fromkeys((2, 3, 4, 5, 8), 0.0) for name in equal(1.0).spills}
    spills["turn"] = spills["turn"] | {8: 0.5}
    rates = Rates.from_json({**equal(1.0).to_json(), "spills": spills})
    assert rates.best_halves(2048)[1][-1] != 8
    # 4096 is 8 to the power of 4: any other choice is one stage more
    assert rates.best_halves(4096) == ((8, 8), (8, 8))
