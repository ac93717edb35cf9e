"""TVM's RPC server on a machine with a GPU: `python -m rpe_tvm.tune.gpu_server --tracker HOST:PORT --key KEY`.

TVM's own server knows no GPU of AMD's. This one has one function more, `FUNCTION`, which answers a question of
`tune.gpu_remote` in a process of its own (`tune.gpu_job`), where no TVM is and PyTorch may be loaded.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from rpe_tvm.tune.options import address

FUNCTION = "rpe_tvm.tune.gpu_job"
CANDIDATES = "candidates.tar"  # among the uploads of a session
_TOP = str(Path(__file__).resolve().parents[2])  # where this package is: a session runs in a directory of its own


def main(argv: Sequence[str] | None = None) -> None:
    """Serve until the process ends."""
    options = argparse.ArgumentParser(description="Race candidates for GPUs that scripts/tune_rocm.py sends.")
    options.add_argument("--tracker", type=address, required=True, metavar="HOST:PORT", help="TVM's RPC tracker")
    options.add_argument("--key", required=True, help="name that the machine is asked for by")
    options.add_argument("--host", default="0.0.0.0", help="address to listen on (default: %(default)s)")
    options.add_argument("--port", type=int, default=9090, help="first port to try (default: %(default)s)")
    options.add_argument("--port-end", type=int, default=9199, help="end of the ports to try (default: %(default)s)")
    options.add_argument("--custom-addr", help="address to tell the tracker, behind another network")
    given = options.parse_args(argv)
    os.environ["TVM_USE_RUNTIME_LIB"] = "1"  # also of the processes that TVM starts
    from tvm import rpc

    server = rpc.Server(
        given.host,
        given.port,
        given.port_end,
        tracker_addr=given.tracker,
        key=given.key,
        custom_addr=given.custom_addr,
        server_init_callback=_register,
    )
    server.proc.join()


def _register() -> None:
    import tvm_ffi

    tvm_ffi.register_global_func(FUNCTION, _answer, override=True)


def _answer(question: str) -> str:
    """Run `tune.gpu_job` in the session's directory, where its uploads are."""
    Path("question.json").write_text(question, encoding="utf-8")
    command = [sys.executable, "-m", "rpe_tvm.tune.gpu_job", "question.json", CANDIDATES]
    path = os.pathsep.join(part for part in (os.environ.get("PYTHONPATH"), _TOP) if part)
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path}, check=False)
    if done.returncode != 0:
        said = (done.stderr.strip().splitlines() or ["nothing"])[-1]
        return json.dumps({"failure": f"the process of the race ended with status {done.returncode}; it said: {said}"})
    return done.stdout.splitlines()[-1]


if __name__ == "__main__":
    main()
