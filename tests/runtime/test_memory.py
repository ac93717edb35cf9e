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


TRAINING = """
import json, pathlib, sys
import torch
from rpe_tvm.peers import torch_fft_attention
from rpe_tvm.torch import NPRF, gaussian_projection, kernelized_attention

def status(field):
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field))

def step(n):
    tensors = [x.requires_grad_() for x in torch.randn(3, 1, 4, n, 64).unbind()]
    bias, projection = torch.randn(4, 2 * n - 1).requires_grad_(), gaussian_projection(32, 64, seed=0)
    if sys.argv[1] == "ours":
        out = kernelized_attention(*tensors, bias, feature_map=NPRF(projection))
    else:
        out = torch_fft_attention(*tensors, bias, projection)
    out.backward(torch.randn(out.shape))
    return all(x.grad.isfinite().all() for x in (*tensors, bias))

n = int(sys.argv[2])
if sys.argv[1] == "ours":
    from rpe_tvm.torch.dispatch import get_backward, get_operator
    get_operator(n, 32, 64), get_backward(n, 32, 64)  # loaded before, in a process that compiles nothing
else:
    step(64)
before = status("VmRSS")
finite = step(n)
print(json.dumps([status("VmHWM") - before, finite]))
"""


def peak_of_training(whose, n):
    command = [sys.executable, "-W", "ignore", "-c", TRAINING, whose, str(n)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    peak, finite = json.loads(done.stdout)
    assert finite
    return peak


def test_peak_memory_of_forward_and_backward_is_a_tenth_of_the_torch_fft_formula():
    torch_dispatch = pytest.importorskip("rpe_tvm.torch.dispatch")
    n, short = 16384, 1024
    for each in (torch_dispatch.get_operator, torch_dispatch.get_backward):
        each(n, 32, 64)  # compiled here, so that the other process only loads them
    # Every array of the formula has a length of n or of its transform, 2n, so its memory is linear in n.
    formula = peak_of_training("torch.fft", short) * (n // short)
    assert peak_of_training("ours", n) < formula / 10


def test_peak_memory_of_a_long_sequence_is_under_three_times_inputs_and_output():
    target = targets.detect()
    path = build.compile_operator(wisdom.choose(target.id, 65536, 32, 64, target.lanes), target)
    done = subprocess.run([sys.executable, "-c", PROGRAM, str(path)], capture_output=True, text=True, check=True)
    peak, size, finite = json.loads(done.stdout)
    assert finite
    # an array of n * m * d alone would be eight times the four tensors
    assert size < peak < 3 * size
