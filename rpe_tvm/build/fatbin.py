"""Looks into device code: which architectures a library has machine code and PTX for."""

from __future__ import annotations

import struct

from rpe_tvm.errors import BuildError

# The format of fatbinary files, as nvcc 13 writes it: a header (magic, version, its own size, bytes that follow), then
# entries, each with a header (kind, version, its own size, bytes that follow, ..., architecture at byte 28).
_MAGIC = 0xBA55ED50
_FILE = struct.Struct("<IHHQ")
_ENTRY = struct.Struct("<HHIQ12xI")
_PTX, _MACHINE_CODE = 1, 2


def contents(data: bytes) -> tuple[list[str], list[str]]:
    """The architectures that `data` holds machine code for, and those that it holds PTX for.

    Parameters
    ----------
    data
        A fatbinary file, or a library that has one in it.

    Returns
    -------
    machine_code, ptx
        Such as ``["sm_80", "sm_90"]``, in the order of the file.
    """
    machine_code: list[str] = []
    ptx: list[str] = []
    start = data.find(struct.pack("<I", _MAGIC))
    if start < 0:
        return machine_code, ptx
    try:
        _, _, header, size = _FILE.unpack_from(data, start)
        position, end = start + header, start + header + size
        while position < end:
            kind, _, header, size, arch = _ENTRY.unpack_from(data, position)
            if header < _ENTRY.size:
                raise BuildError(f"Damaged device code: an entry with a header of {header} bytes.")
            if kind in (_PTX, _MACHINE_CODE):
                (ptx if kind == _PTX else machine_code).append(f"sm_{arch}")
            position += header + size
    except struct.error as error:
        raise BuildError(f"Damaged device code: {error}.") from error
    return machine_code, ptx


def check_library(data: bytes, architectures: tuple[str, ...]) -> None:
    """Raise `BuildError` unless a library holds machine code for all of `architectures`, PTX of the last, no source.

    TVM packs CUDA source where it finds no driver; such a library would need a compiler where it runs.
    """
    if b"__global__" in data:
        raise BuildError("The library holds CUDA source: it would be compiled again wherever it is loaded.")
    machine_code, ptx = contents(data)
    missing = [arch for arch in architectures if arch not in machine_code]
    if missing or architectures[-1] not in ptx:
        raise BuildError(
            f"The library lacks device code: expected machine code for {', '.join(architectures)} and PTX of "
            f"{architectures[-1]}, found machine code for {', '.join(machine_code) or 'none'} and PTX of "
            f"{', '.join(ptx) or 'none'}."
        )
