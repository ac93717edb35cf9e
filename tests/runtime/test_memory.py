"""Nothing of size n * m * d or n * n is ever allocated."""

import json
import subprocess
import sys

import pytest

from rpe_tvm import build, targets
from rpe_tvm.plan import wisdom

pytestmark = pytest.mark.compile

PROGRAM = """
import json, pathlib, sys
import numpy as np
from rpe_tvm import runtime

def status(field):
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field))

n, heads, m, d = 65536, 4, 32, 64
operator = runtime.load(sys.argv[1])
random = np.random.default_rng(0)
before = status("VmRSS")
query, key, value = (random.standard_normal((1, heads, n, d), dtype="f4") for _ in range(3))
out = np.zeros_like(query)
bias = random.standard_normal((heads, 2 * n - 1), dtype="f4")
operator(query, key, value, bias, random.standard_normal((m, d), dtype="f4"), out=out)
peak = status("VmHWM") - before
print(json.dumps([peak, query.nbytes + key.nbytes + value.nbytes + out.nbytes, bool(np.isfinite(out).all())]))
"""


def test_peak_memory_of_a_long_sequence_is_under_three_times_inputs_and_output():
    target = targets.detect()
    path = build.compile_operator(wisdom.choose(target.id, 65536, 32, 64, target.lanes), target)
    done = subprocess.run([sys.executable, "-c", PROGRAM, str(path)], capture_output=True, text=True, check=True)
    peak, size, finite = json.loads(done.stdout)
    assert finite
    # an array of n * m * d alone would be eight times the four tensors
    assert size < peak < 3 * size
