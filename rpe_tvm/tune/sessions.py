"""Jobs on machines behind TVM's RPC tracker, each in a session of its own, which runs in a process of this machine.

A process of its own, because a call to a machine that is gone blocks in TVM and only ends with the process.
"""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from rpe_tvm.errors import TuningError

# sessions that may end while a job runs in them before it counts as failed: it may be the cause
SESSIONS = 2
# what a server says that ends a session because it takes too long
TIMED_OUT = "RPCSessionTimeoutError"
# between two requests to a tracker that answers with an error
PAUSE_SECONDS = 1.0
# how much longer than the server, which ends a session that takes too long, this side waits for it
GRACE_SECONDS = 10


@dataclass(frozen=True)
class Connection:
    """How to reach the machines.

    Parameters
    ----------
    host, port : str, int
        Of the tracker.
    key : str
        Under which the machines' servers are registered; they must be of one kind.
    wait : float
        Seconds to wait for a machine: until one is started, comes back, or has finished other work.
    """

    host: str
    port: int
    key: str
    wait: float

    @property
    def name(self) -> str:
        """For messages."""
        return f"Boards {self.key!r} at tracker {self.host}:{self.port}"


def answer(connection: Connection, module: str, job: Mapping[str, Any], timeout: float) -> dict[str, Any] | str:
    """Return the answer of the first session that gives one, or why there is none.

    Parameters
    ----------
    connection : Connection
        Where a machine is.
    module : str
        What to run in a process of this machine; it calls `run` with what it does in a session.
    job : mapping
        What it is given.
    timeout : float
        Seconds for the session.

    Raises
    ------
    TuningError
        If no machine comes within `connection.wait` seconds.
    """
    for attempt in range(1, SESSIONS + 1):
        found = _session(connection, module, job, timeout)
        if not isinstance(found, str):
            return found
        if TIMED_OUT in found:
            return f"no answer within {timeout:.0f} s"
        if attempt < SESSIONS:
            tqdm.write(f"{connection.name}: a session ended ({found}); trying again on the next free board")
    return f"{SESSIONS} sessions ended while it ran: {found}"


def open_session(job: Mapping[str, Any]) -> tuple[Any, Any]:
    """Return the tracker and a session with a machine; the calling process ends if that takes too long."""
    # tvm_ffi imports torch where it is installed, which takes seconds
    sys.modules["torch"] = None  # type: ignore[assignment]
    from tvm import rpc

    # SIGALRM ends the process, also where it waits in TVM
    signal.alarm(job["wait"])
    tracker = rpc.connect_tracker(*job["tracker"])
    remote = tracker.request(job["key"], session_timeout=job["timeout"], max_retry=1)
    signal.alarm(job["timeout"] + GRACE_SECONDS)
    print("connected", flush=True)
    return tracker, remote


def read_job() -> dict[str, Any]:
    """The job that `answer` gave to this process."""
    job: dict[str, Any] = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    return job


def _session(connection: Connection, module: str, job: Mapping[str, Any], timeout: float) -> dict[str, Any] | str:
    """Return the answer of `module`, or why the session ended without one."""
    given = {
        **job,
        "tracker": [connection.host, connection.port],
        "key": connection.key,
        "timeout": math.ceil(timeout),
    }
    deadline = time.monotonic() + connection.wait
    while True:
        given["wait"] = max(1, math.ceil(deadline - time.monotonic()))
        status, connected, rest, reason = _run(module, given)
        if status == -signal.SIGINT:
            raise KeyboardInterrupt
        if connected:
            found: dict[str, Any] = json.loads(rest) if status == 0 else {}
            return found or reason
        if time.monotonic() > deadline:
            raise TuningError(
                f"{connection.name}: none was free within {connection.wait:.0f} s ({reason}). Start a server there "
                f"(docs/tuning.md), look at python -m tvm.exec.query_rpc_tracker --host {connection.host} --port "
                f"{connection.port}, and go on with --resume."
            )
        time.sleep(PAUSE_SECONDS)


def _run(module: str, job: Mapping[str, Any]) -> tuple[int, bool, str, str]:
    """Return the status of `module`, whether it had a machine, the rest of its output, and why it failed."""
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump(job, file)
        file.flush()
        done = subprocess.run(
            [sys.executable, "-m", module, file.name],
            capture_output=True,
            text=True,
            env={**os.environ, "TVM_USE_RUNTIME_LIB": "1"},  # the compiler would take seconds to load
            check=False,
        )
    connected, _, rest = done.stdout.partition("\n")
    if done.returncode == -signal.SIGALRM:
        reason = "no answer in time"
    else:
        reason = (done.stderr.strip().splitlines() or [f"its client ended with status {done.returncode}"])[-1]
    return done.returncode, connected == "connected", rest, reason
