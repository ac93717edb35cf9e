"""Boards behind TVM's RPC tracker as a place to run candidates: one or many of a kind, which may come and go."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rpe_tvm.build import link
from rpe_tvm.errors import TuningError
from rpe_tvm.plan.wisdom import EMULATED
from rpe_tvm.targets import TargetSpec
from rpe_tvm.tune import board_facts, sessions
from rpe_tvm.tune.board_facts import Board
from rpe_tvm.tune.measure import Contestant, Timing
from rpe_tvm.tune.sessions import Connection

SOURCE = Path(__file__).with_name("board.cc")


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
                f"{connection.name}: the first session failed: {answer}. Expected a board that runs code for "
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
                f"{self._connection.name}: expected boards of one kind, {self.device['device']}, found "
                f"{device['device']}, whose times do not compare. Start its server with another --key."
            )
        return [Timing(tuple(t["seconds"]), t["error"], t["failure"]) for t in answer["timings"]]

    def _device(self, text: str) -> dict[str, Any]:
        board: Board = board_facts.parse(text, self._target.machine)
        missing = sorted(set(self._target.features) - board.flags)
        if missing:
            raise TuningError(
                f"{self._connection.name}: {board.name} lacks {' '.join(missing)}, which {self._target.id} needs. Give "
                "its own --target."
            )
        if not board.is_emulated and not self._is_emulated:
            return {"device": board.name}
        return {"device": board.name, EMULATED: True}

    def _answer(
        self, contestants: Sequence[Contestant], threads: int, seconds: float, timeout: float
    ) -> dict[str, Any] | str:
        """Return the answer of `board_session`, or why there is none."""
        job = {
            "helper": str(self._helper),
            "contestants": [[str(each.library), str(each.inputs)] for each in contestants],
            "threads": threads,
            "seconds": seconds,
        }
        return sessions.answer(self._connection, "rpe_tvm.tune.board_session", job, timeout)
