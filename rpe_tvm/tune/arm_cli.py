"""Command line of `scripts/tune_arm.py`: tuning on boards behind TVM's RPC tracker."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence

from rpe_tvm import targets
from rpe_tvm.errors import TuningError
from rpe_tvm.targets import TargetSpec
from rpe_tvm.tune import cli
from rpe_tvm.tune.boards import Boards
from rpe_tvm.tune.options import address
from rpe_tvm.tune.session import Run
from rpe_tvm.tune.sessions import Connection


def parser() -> argparse.ArgumentParser:
    """Return the parser: the options of all tuning scripts, and those of boards."""
    options = cli.parser()
    options.description = (
        "Measure on boards, over TVM's RPC, which algorithm and factorisation is fastest at which length, tune its "
        "schedule with MetaSchedule, and add the result to the tuning logs. docs/tuning.md says how to start a board."
    )
    options.add_argument("--tracker", type=address, required=True, metavar="HOST:PORT", help="TVM's RPC tracker")
    options.add_argument("--key", required=True, help="key of the boards' servers, which must be of one kind")
    options.add_argument("--target", required=True, help="what to compile for, as cortex-a72")
    options.add_argument("--timeout", type=float, default=120.0, help="seconds for one candidate (default 120)")
    options.add_argument("--wait", type=float, default=300.0, help="seconds to wait for a board (default 300)")
    options.add_argument(
        "--emulated",
        action="store_true",
        help="times mean nothing, though the board looks real; QEMU's user mode is found out without it",
    )
    return options


def main(argv: Sequence[str] | None = None) -> int:
    """Tune on boards; returns as `cli.main`."""
    options = parser().parse_args(argv)
    return cli.finish(lambda: _run_of(options), resume=options.resume)


def _run_of(options: argparse.Namespace) -> Run:
    target = targets.preset(options.target)
    if not isinstance(target, TargetSpec):
        raise TuningError(f"Expected a CPU as --target, got {options.target}. For GPUs: python scripts/tune_cuda.py.")
    run = cli.run_of(options, target)
    host, port = options.tracker
    connection = Connection(host, port, options.key, options.wait)
    boards = Boards.connect(connection, target, run.work_dir / "helper" / target.id, is_emulated=options.emulated)
    return dataclasses.replace(run, timeout=options.timeout, place=boards)
