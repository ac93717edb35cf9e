"""Times candidates on a board, in one session of TVM's RPC: `python -m rpe_tvm.tune.board_session JOB.json`.

It prints `connected` when it has a board, and then the answer as one line of JSON; an end without an answer is the
session's.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from rpe_tvm.tune import sessions
from rpe_tvm.tune.case import Case
from rpe_tvm.tune.measure import ROUNDS

# calls that are timed one by one in a round, at most
MAX_REPEATS = 100_000

# seconds of each of so many calls
Timer = Callable[[int], "tuple[float, ...]"]


def _main(job: dict[str, Any]) -> dict[str, Any]:
    tracker, remote = sessions.open_session(job)
    servers = [each["key"] for each in tracker.summary()["server_info"]].count(f"server:{job['key']}")
    remote.upload(job["helper"], "board.so")
    prepare = remote.load_module("board.so")["prepare"]
    board = str(prepare(job["threads"]))

    cases = {path: Case.load(Path(path)) for path in {inputs for _, inputs in job["contestants"]}}
    arguments = {path: [_upload(remote, each) for each in case.arguments] for path, case in cases.items()}
    timers: list[Timer] = []
    answers: list[dict[str, Any]] = []
    for k, (library, inputs) in enumerate(job["contestants"]):
        answer: dict[str, Any] = {"seconds": [], "error": 0.0, "failure": ""}
        try:
            remote.upload(library, f"candidate{k}.so")
            timer, (answer["error"], answer["failure"]) = _check(
                remote, f"candidate{k}.so", arguments[inputs], cases[inputs]
            )
            timers.append(timer)
        except Exception as error:  # TVM raises many kinds
            if _has_ended(lambda: prepare(job["threads"])):
                raise
            timers.append(lambda repeats: ())
            answer["failure"] = " ".join(str(error).split()) or type(error).__name__
        answers.append(answer)

    estimates = [0.0 if answer["failure"] else min(timer(1)) for timer, answer in zip(timers, answers, strict=True)]
    for _ in range(ROUNDS):
        for timer, answer, estimate in zip(timers, answers, estimates, strict=True):
            if not answer["failure"]:
                repeats = int(job["seconds"] / ROUNDS / max(estimate, 1e-9))
                answer["seconds"].append(min(timer(min(max(repeats, 1), MAX_REPEATS))))
    return {"board": board, "servers": servers, "timings": answers}


def _has_ended(call: Callable[[], Any]) -> bool:
    """Whether a session does not even answer a call that has worked before."""
    try:
        call()
    except Exception:  # TVM raises many kinds
        return True
    return False


def _upload(remote: Any, array: Any) -> Any:
    import tvm

    return tvm.runtime.tensor(array, remote.cpu(0))


def _check(remote: Any, name: str, arrays: list[Any], case: Case) -> tuple[Timer, tuple[float, str]]:
    """Call the function `main` of an uploaded library once; return what times it, and `Case.check` of its outputs."""
    module = remote.load_module(name)
    outputs = [_upload(remote, np.full(output.shape, np.nan, np.float32)) for output in case.outputs]
    module["main"](*arrays, *outputs)

    def timer(repeats: int) -> tuple[float, ...]:
        return tuple(module.time_evaluator("main", remote.cpu(0), number=1, repeat=repeats)(*arrays, *outputs).results)

    return timer, case.check([output.numpy() for output in outputs])


if __name__ == "__main__":
    print(json.dumps(_main(sessions.read_job())))
