"""Export a model that train_shapes.py trained for a device without Python; see docs/deployment.md.

The archive holds the whole model: one library, its weights, a C++ host, and an example with its expected output.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
import train_shapes

from rpe_tvm import targets
from rpe_tvm.edge import export_model
from rpe_tvm.errors import BuildError, RpeTvmError
from rpe_tvm.gpu_targets import GpuTargetSpec


def load(checkpoint: Path) -> tuple[train_shapes.VisionModel, train_shapes.Sizes]:
    """The model of a checkpoint, for inference."""
    stored = torch.load(checkpoint, map_location="cpu", weights_only=True)
    settings = stored["settings"]
    fields = train_shapes.Sizes.__dataclass_fields__
    sizes = train_shapes.Sizes(**{name: settings[name] for name in fields})
    model = train_shapes.VisionModel(settings["contestant"], sizes, settings["seed"])
    model.load_state_dict(stored["model"])
    return model.eval(), sizes


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True, help="of nprf or nprf+rpe-1d")
    parser.add_argument("--target", required=True, help="a CPU, as of python -m rpe_tvm compile")
    parser.add_argument("--threads", choices=["openmp", "none"], default="openmp", help="default: %(default)s")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="the archive, such as model.tar.gz")
    args = parser.parse_args()
    try:
        target = targets.preset(args.target)
        if isinstance(target, GpuTargetSpec):
            raise BuildError(f"Expected a CPU, got the target {args.target}.")
        model, sizes = load(args.checkpoint)
        pixels, _ = train_shapes.images(1, sizes, torch.Generator().manual_seed(2**40))
        with torch.no_grad():
            program = torch.export.export(model, (pixels,))
        path = export_model(program, target, args.out, args.threads)
    except (OSError, RpeTvmError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{path}  {path.stat().st_size / 1024:.1f} KiB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
