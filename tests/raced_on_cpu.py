"""Races of candidates for GPUs on the CPU: artefacts are manifests alone, attention is torch's, the clock is a fake."""

from __future__ import annotations

import itertools
import json
import types
from pathlib import Path
from typing import Any

import torch

from rpe_tvm import bench_cuda_clock, bench_cuda_machine, peers
from rpe_tvm.plan import gpu_wisdom
from rpe_tvm.torch import cuda
from rpe_tvm.tune import gpu_amd, gpu_measure


def load(state: Any, path: Path) -> Any:
    """An operator in the place of one that is loaded; `state.raced` remembers its label."""
    state.raced.append(path.parent.name)
    fields = json.loads((path / "manifest.json").read_text())["config"]
    return types.SimpleNamespace(config=gpu_wisdom.config_from_json(fields), name=path.parent.name)


def install(patch: Any, state: Any) -> None:
    """Put the CPU in the place of a GPU.

    `state.cost` has seconds of a call by candidate, `state.spoil` what changes its result, `state.now` is the time.
    """

    class Event:
        def record(self) -> None:
            self.at = state.now

        def synchronize(self) -> None:
            pass

        def elapsed_time(self, later: Any) -> float:
            return 1e3 * float(later.at - self.at)

    def attention(
        instance: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        rpe_bias: torch.Tensor,
        projection: torch.Tensor,
        out: torch.Tensor,
        *,
        feature_map: str,
        is_causal: bool,
    ) -> None:
        assert feature_map == "nprf"
        state.now += state.cost.get(instance.name, 1e-3)
        q, k, v = (x.float() for x in (query, key, value))
        result = peers.torch_fft_attention(q, k, v, rpe_bias, projection, is_causal=is_causal)
        out.copy_(state.spoil.get(instance.name, lambda result: result)(result))

    def capture(call: Any, count: int) -> tuple[Any, None]:
        return types.SimpleNamespace(replay=lambda: [call() for _ in range(count)]), None

    patch.setattr(gpu_measure, "DEVICE", "cpu")
    patch.setattr(gpu_measure, "HEADS", 2)
    patch.setattr(gpu_measure, "MOST_CALLS", 2)
    patch.setattr(bench_cuda_clock, "TURN_CALLS", 2)
    # checks have taken all of the time: three turns each, not so many as fit into a budget of real seconds
    patch.setattr(gpu_measure, "time", types.SimpleNamespace(monotonic=itertools.count(step=1000).__next__))
    patch.setattr(cuda, "attention", attention)
    patch.setattr(bench_cuda_clock, "new_event", Event)
    patch.setattr(bench_cuda_clock, "capture", capture)


def install_as_amd(scenario: Path) -> None:
    """Let this process believe that it has a GPU of AMD's; the file says what candidates take, and which are bad."""
    said = json.loads(scenario.read_text())
    spoil = {name: _wrong for name in said["wrong"]}
    state = types.SimpleNamespace(now=0.0, cost=said["cost"], spoil=spoil, raced=[])
    install(_Patch, state)
    gpu_amd.obstacle = lambda: None
    gpu_amd.architecture = lambda: "gfx942"
    gpu_amd.load = lambda path: load(state, path)
    machine = {"name": "Fake MI300X", "driver_version": "6.4", "torch": "2.0"}
    bench_cuda_machine.environment = lambda: machine


class _Patch:
    """As pytest.MonkeyPatch, for good."""

    setattr = staticmethod(setattr)


def _wrong(out: torch.Tensor) -> torch.Tensor:
    return 1.1 * out
