"""Asks a machine with a GPU one question, in one session of TVM's RPC: see `tune.sessions`."""

from __future__ import annotations

import json
from typing import Any

from rpe_tvm.tune import sessions
from rpe_tvm.tune.gpu_server import CANDIDATES, FUNCTION


def _main(job: dict[str, Any]) -> str:
    _, remote = sessions.open_session(job)
    remote.upload(job["candidates"], CANDIDATES)
    return str(remote.get_function(FUNCTION)(json.dumps(job["question"])))


if __name__ == "__main__":
    print(_main(sessions.read_job()))
