"""TVM's RPC tracker and servers as processes of this machine, which stand for boards."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
from tvm import rpc

ROOT = Path(__file__).resolve().parents[1]


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def hide_torch(directory: Path) -> str:
    """Make a directory in which Python finds a torch that cannot be imported."""
    (directory / "torch.py").write_text('raise ImportError("hidden")\n')
    return str(directory)


class Server:
    """A tracker or a server with the worker process that it starts, in a process group of their own.

    `path` is its PYTHONPATH. That of boards hides torch, which they do not have: tvm_ffi imports it where it is there.
    """

    def __init__(self, path: str, module: str, *arguments: str) -> None:
        self.port = free_port()
        ports = ["--port", str(self.port), "--port-end", str(self.port + 1)]
        self._process = subprocess.Popen(
            [sys.executable, "-m", module, "--host", "127.0.0.1", *ports, *arguments],
            env={**os.environ, "TVM_USE_RUNTIME_LIB": "1", "PYTHONPATH": path},
            cwd=ROOT,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    def wait_for_session(self) -> None:
        """Wait until a client has a session, which is a process of its own."""
        main = psutil.Process(self._process.pid)
        while len(main.children(recursive=True)) < 2:
            time.sleep(0.1)

    def kill(self) -> None:
        """As if the board had lost its power, but that the system still closes its connections."""
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()


class Boards:
    """A tracker, and boards that come and go."""

    key = "board"

    def __init__(self, without_torch: str) -> None:
        self._without_torch = without_torch
        self.tracker = Server(without_torch, "tvm.exec.rpc_tracker")
        self._boards: list[Server] = []

    def start(self) -> Server:
        """Start a board and return it; it is there seconds later."""
        board = Server(
            self._without_torch, "tvm.exec.rpc_server", "--tracker", f"127.0.0.1:{self.tracker.port}", "--key", self.key
        )
        self._boards.append(board)
        return board

    def wait_for(self, *, free: int) -> None:
        """Wait until so many boards have nothing to do."""
        tracker = rpc.connect_tracker("127.0.0.1", self.tracker.port)
        deadline = time.monotonic() + 120
        while tracker.summary()["queue_info"].get(self.key, {"free": 0})["free"] != free:
            assert time.monotonic() < deadline, f"never {free} free boards"
            time.sleep(0.1)

    def stop(self) -> None:
        """Kill everything that was started."""
        for server in (*self._boards, self.tracker):
            server.kill()
