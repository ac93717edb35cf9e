"""Exceptions of rpe_tvm. Each one is also the built-in exception that a caller would expect."""

from __future__ import annotations

from collections.abc import Iterable


class RpeTvmError(Exception):
    """Base class of everything that rpe_tvm raises on purpose."""


class BuildError(RpeTvmError, RuntimeError):
    """An operator could not be lowered, compiled or linked."""


class CompilerNotFoundError(BuildError):
    """A C++ compiler, or nvcc or ld.lld for a GPU target, was not found on this machine; exporting needs it."""


class GpuNotFoundError(RpeTvmError, RuntimeError):
    """This process can use no GPU."""


class HipError(RpeTvmError, RuntimeError):
    """A call of AMD's HIP failed."""


class SecondGradientError(RpeTvmError, NotImplementedError):
    """A gradient of attention's gradients was asked for."""


class GpuGradientError(RpeTvmError, NotImplementedError):
    """A gradient of an operator was asked for on a GPU, where it has none yet."""


class ArtefactError(RpeTvmError, RuntimeError):
    """A compiled artefact was refused.

    Parameters
    ----------
    message
        What was looked for and what to do next.
    reasons
        Why each candidate was refused, one line per candidate; they are appended to the message.
    """

    reasons: tuple[str, ...]

    def __init__(self, message: str, reasons: Iterable[str] = ()) -> None:
        self.reasons = tuple(reasons)
        super().__init__("\n  - ".join((message, *self.reasons)))


class ShapeError(RpeTvmError, ValueError):
    """An array has a shape that the operator does not accept."""


class DTypeError(RpeTvmError, TypeError):
    """An array has a dtype that the operator does not accept."""


class TuningError(RpeTvmError, RuntimeError):
    """A tuning run produced no valid record, or a tuning log cannot be used."""
