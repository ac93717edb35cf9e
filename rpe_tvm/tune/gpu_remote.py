"""A GPU behind TVM's RPC tracker as a place to race candidates; `tune.gpu_server` runs on its machine."""

from __future__ import annotations

import tarfile
import tempfile
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rpe_tvm.errors import TuningError
from rpe_tvm.tune import sessions
from rpe_tvm.tune.gpu_candidates import Size
from rpe_tvm.tune.gpu_measure import GpuLostError, Timing
from rpe_tvm.tune.gpu_place import Gpu
from rpe_tvm.tune.sessions import Connection


class RemoteGpu:
    """The GPU of a machine that a tracker knows.

    Every race is a session, and there a process: a candidate that breaks the GPU's context or crashes ends that alone.

    Parameters
    ----------
    connection : Connection
        Where it is.
    timeout : float
        Seconds that a race may take beyond the time that it has: upload, loading, the last turn.
    """

    def __init__(self, connection: Connection, timeout: float) -> None:
        self._connection, self._timeout = connection, timeout

    def gpu(self, kind: str) -> Gpu:
        """Ask the machine.

        Raises
        ------
        TuningError
            If no machine comes, or what comes cannot answer.
        """
        return Gpu(**self._answer({"kind": kind}, {}, 0.0)["gpu"])

    def measure(self, size: Size, artefacts: Mapping[str, Path], seconds: float) -> dict[str, Timing]:
        """Race candidates there.

        Raises
        ------
        TuningError
            If no machine comes, or the race ends without an answer; `GpuLostError` where a candidate is to blame.
        """
        places = {name: f"{name}/{artefact.name}" for name, artefact in artefacts.items()}
        found = self._answer({"size": asdict(size), "artefacts": places, "seconds": seconds}, artefacts, seconds)
        if "lost" in found:
            raise GpuLostError(*found["lost"])
        return {name: Timing(tuple(t["seconds"]), t["error"], t["failure"]) for name, t in found["timings"].items()}

    def _answer(self, question: Mapping[str, Any], artefacts: Mapping[str, Path], seconds: float) -> dict[str, Any]:
        with tempfile.TemporaryDirectory() as scratch:
            archive = Path(scratch) / "candidates.tar"
            with tarfile.open(archive, "w") as opened:
                for name, artefact in artefacts.items():
                    opened.add(artefact, f"{name}/{artefact.name}")
            job = {"question": question, "candidates": str(archive)}
            found = sessions.answer(self._connection, "rpe_tvm.tune.gpu_remote_session", job, seconds + self._timeout)
        if isinstance(found, str):
            found = {"failure": found}
        if "failure" in found:
            raise TuningError(
                f"{self._connection.name}: {found['failure']}. Expected python -m rpe_tvm.tune.gpu_server there, with "
                "PyTorch for the GPU (docs/tuning.md)."
            )
        return found
