"""The schedules of all operators for one kind of CPU: what CPUs share, with the decisions in which kinds differ."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from tvm.s_tir import Schedule

from rpe_tvm.plan.backward import BackwardConfig
from rpe_tvm.plan.config import AttentionConfig
from rpe_tvm.plan.split import Factorised
from rpe_tvm.plan.toeplitz import ToeplitzConfig
from rpe_tvm.schedules import (
    cpu,
    cpu_backward,
    cpu_denominator_backward,
    cpu_direct_backward,
    cpu_features_backward,
    cpu_fft,
    cpu_panels,
    cpu_toeplitz,
)
from rpe_tvm.schedules.cpu import Choices
from rpe_tvm.te.features import FeatureMap


@dataclass(frozen=True)
class CpuSchedules:
    """Schedules for one kind of CPU.

    Parameters
    ----------
    direct_choices : callable
        Config of an operator by tiles -> the fixed decisions of its default schedule.
    score_vectors : tuple of int
        Vectors of keys that a search tries for the scores of `direct`.
    accumulators : callable
        Lanes of an operator -> vector registers in which features are summed.
    task_floats : int
        Arrays of one product by FFT with more floats are shared by all threads, because one for each thread would not
        fit into a shared cache.
    """

    direct_choices: Callable[[AttentionConfig], Choices]
    score_vectors: tuple[int, ...]
    accumulators: Callable[[int], int]
    task_floats: int

    def default_choices(self, config: AttentionConfig) -> Choices:
        """Return the fixed decisions of the default schedule."""
        if config.algorithm == "fft":
            # parts are cut by the first of two stages or more
            return Choices(cooperative=len(config.outer) > 1 and self._is_cooperative(config))
        return self.direct_choices(config)

    def default(self, sch: Schedule, config: AttentionConfig) -> None:
        """Apply the default schedule of the tuned function of an operator; it needs no record."""
        self.schedule(sch, config, self.default_choices(config))

    def schedule(self, sch: Schedule, config: AttentionConfig, choices: Choices) -> None:
        """Apply the schedule of the config's operator and algorithm with these decisions."""
        if isinstance(config, BackwardConfig):
            is_direct = config.algorithm == "direct"
            (cpu_direct_backward.direct_backward if is_direct else cpu_backward.fft_backward)(sch, config, choices)
        elif config.algorithm == "direct":
            (cpu_panels.panel_attention if config.panel else cpu.direct_attention)(sch, config, choices)
        else:
            cpu_fft.fft_attention(sch, config, choices)

    def space(self, sch: Schedule, config: AttentionConfig) -> list[Schedule]:
        """Return the design spaces of the tuned function for MetaSchedule, tile sizes as `sample_*` decisions."""
        sampled = replace(self.default_choices(config), sampled=True)
        if config.algorithm == "fft":
            alternatives = [sampled, replace(sampled, pad=False)]
        else:
            alternatives = [replace(sampled, score_vectors=vectors) for vectors in self.score_vectors]
        spaces = []
        for choices in alternatives:
            found = sch.copy()
            self.schedule(found, config, choices)
            spaces.append(found)
        return spaces

    def features(self, sch: Schedule, config: AttentionConfig) -> None:
        """Apply the schedule of a feature map."""
        cpu.features(sch, config, self.accumulators(config.lanes))

    def features_backward(self, sch: Schedule, config: BackwardConfig, feature_map: FeatureMap) -> None:
        """Apply the schedule of the gradients of a feature map."""
        cpu_features_backward.features_backward(sch, config, feature_map)

    def weights(self, sch: Schedule, config: AttentionConfig) -> None:
        """Apply the schedule of the table or the spectrum of the weights exp(b)."""
        (cpu.direct_weights if config.algorithm == "direct" else cpu.fft_weights)(sch, config)

    def fft_row_weights(self, sch: Schedule, config: BackwardConfig) -> None:
        """Apply the schedule of the weights of rows in the gradients of the denominator."""
        cpu_denominator_backward.fft_row_weights(sch, config)

    def fft_denominator_backward(self, sch: Schedule, config: BackwardConfig) -> None:
        """Apply the schedule of the gradients of the denominators by FFT."""
        cpu_denominator_backward.fft_denominator_backward(sch, config)

    def plain_weights(self, sch: Schedule, config: ToeplitzConfig) -> None:
        """Apply the schedule of the spectrum of a Toeplitz matrix."""
        cpu.spectrum(sch, config)

    def toeplitz_matmul(self, sch: Schedule, config: ToeplitzConfig) -> None:
        """Apply the schedule of the Toeplitz product."""
        cpu_toeplitz.toeplitz_matmul(sch, config, cooperative=self._is_cooperative(config))

    def toeplitz_correlation(self, sch: Schedule, config: ToeplitzConfig) -> None:
        """Apply the schedule of the gradient of the Toeplitz matrix."""
        cpu_toeplitz.toeplitz_correlation(sch, config)

    def _is_cooperative(self, config: Factorised) -> bool:
        return config.length * 2 * config.lanes > self.task_floats
