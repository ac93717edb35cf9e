"""What the GPUs of this machine can do, asked from NVIDIA's driver."""

from __future__ import annotations

import ctypes
import functools
from dataclasses import dataclass

from rpe_tvm.errors import GpuNotFoundError

DRIVER = "libcuda.so.1"

# CUdevice_attribute of cuda.h
_COMPUTE_CAPABILITY_MAJOR = 75
_COMPUTE_CAPABILITY_MINOR = 76
_SHARED_MEMORY_PER_BLOCK_OPT_IN = 97


@dataclass(frozen=True)
class Gpu:
    """One GPU.

    Attributes
    ----------
    name
        As the driver calls it, such as ``NVIDIA H100 80GB HBM3``.
    arch
        Its architecture, such as ``sm_90``.
    shared_bytes
        Shared memory that one block may have.
    """

    name: str
    arch: str
    shared_bytes: int


@functools.lru_cache(maxsize=1)
def gpus() -> tuple[Gpu, ...]:
    """The GPUs that this process may use, in the driver's order, which is that of torch's device indices.

    Raises
    ------
    GpuNotFoundError
        If there is no driver, or it finds no GPU.
    """
    try:
        driver = ctypes.CDLL(DRIVER)
    except OSError as error:
        raise GpuNotFoundError(f"No NVIDIA GPU: the driver's {DRIVER} cannot be loaded ({error}).") from error

    def call(function: str, *arguments: object) -> None:
        status = getattr(driver, function)(*arguments)
        if status != 0:
            raise GpuNotFoundError(f"No NVIDIA GPU: the driver's {function} failed with CUDA error {status}.")

    def attribute(device: ctypes.c_int, which: int) -> int:
        value = ctypes.c_int()
        call("cuDeviceGetAttribute", ctypes.byref(value), which, device)
        return value.value

    call("cuInit", 0)
    count = ctypes.c_int()
    call("cuDeviceGetCount", ctypes.byref(count))
    if count.value == 0:
        raise GpuNotFoundError("No NVIDIA GPU: the driver lists none. CUDA_VISIBLE_DEVICES may hide it.")
    found = []
    for index in range(count.value):
        device, name = ctypes.c_int(), ctypes.create_string_buffer(256)
        call("cuDeviceGet", ctypes.byref(device), index)
        call("cuDeviceGetName", name, len(name), device)
        major = attribute(device, _COMPUTE_CAPABILITY_MAJOR)
        minor = attribute(device, _COMPUTE_CAPABILITY_MINOR)
        shared_bytes = attribute(device, _SHARED_MEMORY_PER_BLOCK_OPT_IN)
        found.append(Gpu(name.value.decode(errors="replace"), f"sm_{major}{minor}", shared_bytes))
    return tuple(found)
