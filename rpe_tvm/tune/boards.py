"""Boards behind TVM's RPC tracker as a place to run candidates: one or many of a kind, which may come and go."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from rpe_tvm.build import link
from rpe_tvm.errors import TuningError
from rpe_tvm.plan.wisdom import EMULATED
from rpe_tvm.targets import TargetSpec
from rpe_tvm.tune import board_facts
from rpe_tvm.tune.board_facts import Board
from rpe_tvm.tune.measure import Contestant, Timing

SOURCE = Path(__file__).with_name("board.cc")
# sessions that may end while a candidate runs in them before it counts as failed: it may be the cause
SESSIONS = 2
# what a server says that ends a session because it takes too long
TIMED_OUT = "RPCSessionTimeoutError"
# between two requests to a tracker that answers with an error
PAUSE_SECONDS = 1.0


@dataclass(frozen=True)
class Connection:
    """How to reach the boards.

    Parameters
    ----------
    host, port : str, int
        Of the tracker.
    key : str
        Under which the boards' servers are registered; they must be of one kind.
    wait : float
        Seconds to wait for a board: until one is started, comes back, or has finished other work.
    """

    host: str
    port: int
    key: str
    wait: float


class Boards:
    """The boards of one key; made by `connect`.

    A candidate runs in a session of its own, so that one that crashes or hangs ends its session and nothing else. Where
    a session ends while a candidate runs, because it crashed or because the board is gone, it is tried once more, on
    the next free board.
    """

    def __init__(self, connection: Connection, target: TargetSpec, helper: Path, *, is_emulated: bool) -> None:
        self._connection, self._target, self._helper, self._is_emulated = connection, target, helper, is_emulated
        self.jobs = 1
        self.device: Mapping[str, Any] = {}

    @classmethod
    def connect(
        cls, connection: Connection, target: TargetSpec, directory: Path, *, is_emulated: bool = False
    ) -> Boards:
        """Ask a board what it is, and count those that are there.

        Parameters
        ----------
        connection : Connection
            Where they are.
        target : TargetSpec
            What candidates are compiled for.
        directory : Path
            Place for the helper that is compiled for the boards.
        is_emulated : bool
            Whether times mean nothing even if a board looks real.

        Raises
        ------
        TuningError
            If no board comes within `connection.wait` seconds, or if it is none for `target`.
        """
        directory.mkdir(parents=True, exist_ok=True)
        helper = directory / "board.so"
        link.compile_library(SOURCE, helper, target.machine)
        boards = cls(connection, target, helper, is_emulated=is_emulated)
        answer = boards._answer([], 1, 0.0, 60.0)
        if isinstance(answer, str):
            raise TuningError(
                f"{boards._name}: the first session failed: {answer}. Expected a board that runs code for "
                f"{target.machine}, with libgomp and libstdc++ (Debian: apt install libgomp1 libstdc++6)."
            )
        boards.device = boards._device(answer["board"])
        boards.jobs = max(1, answer["servers"])
        return boards

    def measure(self, contestants: Sequence[Contestant], threads: int, seconds: float, timeout: float) -> list[Timing]:
        """Check and time contestants on one board, in turns.

        Raises
        ------
        TuningError
            If no board comes within `Connection.wait` seconds, or if it is another one than before.
        """
        answer = self._answer(contestants, threads, seconds, timeout)
        if isinstance(answer, str):
            return [Timing((), 0.0, answer)] * len(contestants)
        device = self._device(answer["board"])
        if device != self.device:
            raise TuningError(
                f"{self._name}: expected boards of one kind, {self.device['device']}, found {device['device']}, whose "
                "times do not compare. Start its server with another --key."
            )
        return [Timing(tuple(t["seconds"]), t["error"], t["failure"]) for t in answer["timings"]]

    @property
    def _name(self) -> str:
        return f"Boards {self._connection.key!r} at tracker {self._connection.host}:{self._connection.port}"

    def _device(self, text: str) -> dict[str, Any]:
        board: Board = board_facts.parse(text, self._target.machine)
        missing = sorted(set(self._target.features) - board.flags)
        if missing:
            raise TuningError(
                f"{self._name}: {board.name} lacks {' '.join(missing)}, which {self._target.id} needs. Give its own "
                "--target."
            )
        if not board.is_emulated and not self._is_emulated:
            return {"device": board.name}
        return {"device": board.name, EMULATED: True}

    def _answer(
        self, contestants: Sequence[Contestant], threads: int, seconds: float, timeout: float
    ) -> dict[str, Any] | str:
        """Return the answer of the first session that gives one, or why there is none."""
        for attempt in range(1, SESSIONS + 1):
            answer = self._session(contestants, threads, seconds, timeout)
            if not isinstance(answer, str):
                return answer
            if TIMED_OUT in answer:
                return f"no answer within {timeout:.0f} s"
            if attempt < SESSIONS:
                tqdm.write(f"{self._name}: a session ended ({answer}); trying again on the next free board")
        return f"{SESSIONS} sessions ended while it ran: {answer}"

    def _session(
        self, contestants: Sequence[Contestant], threads: int, seconds: float, timeout: float
    ) -> dict[str, Any] | str:
        """Return the answer of `board_session`, or why the session ended without one."""
        where = self._connection
        job = {
            "tracker": [where.host, where.port],
            "key": where.key,
            "helper": str(self._helper),
            "contestants": [[str(each.library), str(each.inputs)] for each in contestants],
            "threads": threads,
            "seconds": seconds,
            "timeout": math.ceil(timeout),
        }
        deadline = time.monotonic() + where.wait
        while True:
            job["wait"] = max(1, math.ceil(deadline - time.monotonic()))
            status, connected, rest, reason = _run(job)
            if status == -signal.SIGINT:
                raise KeyboardInterrupt
            if connected:
                answer: dict[str, Any] = json.loads(rest) if status == 0 else {}
                return answer or reason
            if time.monotonic() > deadline:
                raise TuningError(
                    f"{self._name}: none was free within {where.wait:.0f} s ({reason}). Start a server on a board "
                    f"(docs/tuning.md), look at python -m tvm.exec.query_rpc_tracker --host {where.host} --port "
                    f"{where.port}, and go on with --resume."
                )
            time.sleep(PAUSE_SECONDS)


def _run(job: Mapping[str, Any]) -> tuple[int, bool, str, str]:
    """Return the status of `board_session`, whether it had a board, the rest of its output, and why it failed."""
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump(job, file)
        file.flush()
        done = subprocess.run(
            [sys.executable, "-m", "rpe_tvm.tune.board_session", file.name],
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
