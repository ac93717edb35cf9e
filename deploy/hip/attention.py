"""Attention on an AMD GPU by a code object that was compiled elsewhere, checked against the float64 reference.

On any x86 machine:

    python -m rpe_tvm compile --features 32 --head-dim 64 --lengths 1000 --target gfx942 --out kernels

On the host of the GPU, with ROCm 6.3 or later, a PyTorch built for it, NumPy, apache-tvm-ffi and this package:

    python deploy/hip/attention.py kernels

It has never been run: we had no AMD GPU.
"""

from __future__ import annotations

import argparse
import sys

import numpy as np
import torch

from rpe_tvm import reference
from rpe_tvm.errors import RpeTvmError
from rpe_tvm.torch import NPRF, gaussian_projection, kernelized_attention, use_artefacts

POSITIONS, HEADS, FEATURES, HEAD_DIM = 1000, 8, 32, 64


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("kernels", help="what compile --out wrote")
    directory = options.parse_args().kernels
    if torch.version.hip is None or not torch.cuda.is_available():
        print(
            f"error: PyTorch {torch.__version__} finds no AMD GPU: install one that is built for ROCm", file=sys.stderr
        )
        return 1
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 1, HEADS, POSITIONS, HEAD_DIM).unbind()
    bias = 0.1 * torch.randn(HEADS, 2 * POSITIONS - 1)
    projection = gaussian_projection(FEATURES, HEAD_DIM, seed=0)
    try:
        use_artefacts(directory)
        with torch.no_grad():  # there are no gradients on GPUs yet
            out = kernelized_attention(
                query.cuda(), key.cuda(), value.cuda(), bias.cuda(), feature_map=NPRF(projection.cuda())
            )
    except RpeTvmError as refusal:
        print(f"error: {refusal}", file=sys.stderr)
        return 1
    q, k, v, b, w = (x.double().numpy() for x in (query, key, value, bias, projection))
    *_, expected = reference.attention(q, k, v, b, w, feature_map="nprf", is_causal=False)
    error = float(np.linalg.norm(out.cpu().numpy() - expected) / np.linalg.norm(expected))
    print(f"{torch.cuda.get_device_name()}: relative error {error:.1e} ({'right' if error < 1e-5 else 'WRONG'})")
    return 0 if error < 1e-5 else 1


if __name__ == "__main__":
    sys.exit(main())
