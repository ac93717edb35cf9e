"""What lies where in the work directory of tuning for GPUs: candidates may be built here and raced elsewhere.

- ``origin.json``: versions, commit and date of the candidates
- ``candidates/<label>/<target id>/``: an artefact, ``lib.so`` and ``manifest.json``, or ``failure.json``
- ``candidates/tvm_runtime/``: TVM's libraries that run them
- ``results/<target id>/<size>.json``: finished races
- ``refused/<target id>/<label>.json``: candidates that broke the GPU's context
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rpe_tvm.files import write_json
from rpe_tvm.plan.gpu_wisdom import GpuConfig
from rpe_tvm.tune import store
from rpe_tvm.tune.gpu_candidates import Size, label

NOT_BUILT = "not built: run --build-only for this size"
FAILURE = "failure.json"


@dataclass(frozen=True)
class Work:
    """A work directory."""

    directory: Path

    @property
    def artefacts(self) -> Path:
        """Where all artefacts are."""
        return self.directory / "candidates"

    def artefact(self, config: GpuConfig, target_id: str) -> Path:
        """Where a candidate's artefact is, or shall be."""
        return self.artefacts / label(config) / target_id

    def failure(self, config: GpuConfig, target_id: str) -> str:
        """Why a candidate cannot be raced: what building or an earlier race said, or `NOT_BUILT`; "" if it can."""
        artefact = self.artefact(config, target_id)
        for note in (artefact / FAILURE, self._refused(config, target_id)):
            noted = store.read_json(note)
            if noted is not None:
                return str(noted["reason"])
        return "" if (artefact / "manifest.json").exists() else NOT_BUILT

    def note_failure(self, config: GpuConfig, target_id: str, reason: str) -> None:
        """Keep why a candidate was not built."""
        write_json(self.artefact(config, target_id) / FAILURE, {"config": config.to_json(), "reason": reason})

    def refuse(self, config: GpuConfig, target_id: str, reason: str) -> None:
        """Keep why a candidate shall not be raced again."""
        write_json(self._refused(config, target_id), {"config": config.to_json(), "reason": reason})

    def result(self, size: Size, target_id: str) -> Path:
        """The file of a finished race."""
        return self.directory / "results" / target_id / f"{size.name}.json"

    @property
    def origin(self) -> Path:
        """The file of `store.origin`, written where the candidates were built."""
        return self.directory / "origin.json"

    def _refused(self, config: GpuConfig, target_id: str) -> Path:
        return self.directory / "refused" / target_id / f"{label(config)}.json"


def read_origin(work: Work) -> dict[str, Any]:
    """Return what was written where the candidates were built, empty if nothing was."""
    return dict(store.read_json(work.origin) or {})
