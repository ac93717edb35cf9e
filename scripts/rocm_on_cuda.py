"""Check the schedules of AMD GPUs on an NVIDIA GPU: their configs and limits, compiled for CUDA.

`python scripts/rocm_on_cuda.py --build-only DIR` takes nvcc and no GPU, `python scripts/rocm_on_cuda.py --run-only DIR`
a GPU and neither TVM nor nvcc; without either option both are done. Every result is compared with float64 rows.
"""

import argparse
import sys
from pathlib import Path

from rpe_tvm import gpu_targets
from rpe_tvm.plan import rocm

LENGTHS = (64, 128, 256, 512, 1024, 2048, 4096, 8192, 32768)
FEATURES, HEAD_DIM, TARGET = 32, 64, "sm_90"
CONFIGS = {n: rocm.choose(n, FEATURES, HEAD_DIM, "rocm-gfx942") for n in LENGTHS}


def build(directory: Path) -> None:
    """Compile the configs with AMD's schedules of the feature maps; local memory is CUDA's shared memory."""
    from rpe_tvm.build import compile as compiling
    from rpe_tvm.build import cuda, lower_gpu
    from rpe_tvm.schedules.rocm import WIDEST_ROW

    target = gpu_targets.preset(TARGET)
    cuda.pack_runtime(directory)
    for n, config in CONFIGS.items():
        lowered = lower_gpu.lower(config, WIDEST_ROW)
        artefact = compiling.compile_module(lowered.mod, config.name, config.to_json(), target)
        compiling.copy_artefact(artefact, directory / config.name / target.id)
        print(f"built n = {n}: {config.description}, {config.threads} threads", flush=True)


def run(directory: Path) -> int:
    """Check and time them; returns how many are wrong."""
    from rpe_tvm.tune.gpu_candidates import Size
    from rpe_tvm.tune.gpu_measure import measure

    wrong = 0
    for n, config in CONFIGS.items():
        artefact = directory / config.name / f"cuda-{TARGET}"
        (timing,) = measure(Size("float32", n, FEATURES, HEAD_DIM), {config.name: artefact}, 2.0).values()
        wrong += bool(timing.failure)
        result = timing.failure or f"{1e3 * timing.median:9.4f} ms, relative error {timing.error:.1e}"
        print(f"n = {n:6} {config.description:16} {result}", flush=True)
    return wrong


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("directory", type=Path)
    part = options.add_mutually_exclusive_group()
    part.add_argument("--build-only", action="store_true")
    part.add_argument("--run-only", action="store_true")
    given = options.parse_args()
    if not given.run_only:
        build(given.directory)
    return 0 if given.build_only else min(run(given.directory), 1)


if __name__ == "__main__":
    sys.exit(main())
