"""Answers one question of `tune.gpu_remote` on the machine with the GPU: `python -m rpe_tvm.tune.gpu_job FILE FILE`.

A process of its own, because a candidate may crash it, and without tvm, because that is how operators are used. The
files are the question, in JSON, and an archive of candidates; the answer is one line of JSON on standard output.
"""

from __future__ import annotations

import json
import sys
import tarfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rpe_tvm.tune.gpu_candidates import Size
from rpe_tvm.tune.gpu_measure import GpuLostError
from rpe_tvm.tune.gpu_place import ThisGpu


def _main(question: dict[str, Any], archive: Path) -> dict[str, Any]:
    here = ThisGpu()
    if "kind" in question:
        return {"gpu": asdict(here.gpu(question["kind"]))}
    with tarfile.open(archive) as opened:
        opened.extractall("candidates", filter="data")
    artefacts = {name: Path("candidates", place).resolve() for name, place in question["artefacts"].items()}
    try:
        timings = here.measure(Size(**question["size"]), artefacts, question["seconds"])
    except GpuLostError as error:
        return {"lost": [error.label, error.reason]}
    return {"timings": {name: asdict(timing) for name, timing in timings.items()}}


if __name__ == "__main__":
    print(json.dumps(_main(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")), Path(sys.argv[2]))))
