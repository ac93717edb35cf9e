"""Reads code objects of AMD GPUs: ELF files whose note describes each kernel, as LLVM's AMDGPU manual defines them."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from rpe_tvm.errors import BuildError

_HEADER = struct.Struct("<4sBBBBB7xHHIQQQIHHHHHH")
_SECTION = struct.Struct("<IIQQQQIIQQ")
_SYMBOL = struct.Struct("<IBBHQQ")
_NOTE = struct.Struct("<III")
_SHT_NOTE, _SHT_DYNSYM = 7, 11
_SHARED_OBJECT, _AMDGPU, _HSA = 3, 224, 64  # e_type, e_machine, EI_OSABI
_METADATA = (b"AMDGPU", 32)  # name and type of the note
# Byte of e_flags by which the driver knows the architecture.
MACHINES = {"gfx90a": 0x3F, "gfx942": 0x4C, "gfx1100": 0x41, "gfx1201": 0x4E}


@dataclass(frozen=True)
class CodeObject:
    """What a code object says of itself.

    Attributes
    ----------
    machine
        Its architecture as a number, see `MACHINES`.
    defined, undefined
        Names of its symbols.
    metadata
        The note, ``amdhsa.kernels`` and others.
    """

    machine: int
    defined: frozenset[str]
    undefined: frozenset[str]
    metadata: dict[str, Any]

    @property
    def kernels(self) -> dict[str, dict[str, Any]]:
        """The description of each kernel by name, without the dots that its keys begin with."""
        return {
            kernel[".name"]: {key.removeprefix("."): value for key, value in kernel.items()}
            for kernel in self.metadata.get("amdhsa.kernels", ())
        }


def read(image: bytes) -> CodeObject:
    """Read a code object.

    Raises
    ------
    BuildError
        If it is none, or damaged.
    """
    try:
        magic, bits, order, _, system, _, kind, machine, *_, flags, _, _, _, size, count, _ = _HEADER.unpack_from(image)
        if (magic, bits, order) != (b"\x7fELF", 2, 1) or (system, kind, machine) != (_HSA, _SHARED_OBJECT, _AMDGPU):
            raise BuildError("No code object of an AMD GPU: expected a shared 64-bit ELF file for AMDGPU and HSA.")
        start = struct.unpack_from("<Q", image, 40)[0]
        sections = [_SECTION.unpack_from(image, start + size * index) for index in range(count)]
        symbols = dict(_symbols(image, sections))
        metadata = next(_metadata(image, sections), None)
    except (struct.error, IndexError, UnicodeDecodeError, TypeError) as error:
        raise BuildError(f"Damaged code object: {error}.") from error
    if not isinstance(metadata, dict):
        raise BuildError("Damaged code object: it has no note that describes its kernels.")
    undefined = frozenset(name for name, is_defined in symbols.items() if not is_defined)
    return CodeObject(flags & 0xFF, frozenset(symbols) - undefined, undefined, metadata)


def _symbols(image: bytes, sections: list[tuple[int, ...]]) -> Iterator[tuple[str, bool]]:
    """(name, whether it is defined) of each dynamic symbol."""
    for _, kind, _, _, start, size, link, *_ in sections:
        if kind != _SHT_DYNSYM:
            continue
        names = sections[link][4]
        for at in range(start, start + size, _SYMBOL.size):
            name, _, _, section, _, _ = _SYMBOL.unpack_from(image, at)
            if name:
                yield image[names + name : image.index(b"\0", names + name)].decode(), section != 0


def _metadata(image: bytes, sections: list[tuple[int, ...]]) -> Iterator[Any]:
    for _, kind, _, _, start, size, *_ in sections:
        at, end = start, start + size
        while kind == _SHT_NOTE and at < end:
            name_size, content_size, note = _NOTE.unpack_from(image, at)
            name = at + _NOTE.size
            content = name + _padded(name_size)
            if (image[name : name + name_size].rstrip(b"\0"), note) == _METADATA:
                yield _Reader(image[content : content + content_size]).value()
            at = content + _padded(content_size)


def _padded(size: int) -> int:
    return -(-size // 4) * 4


class _Reader:
    """MessagePack, as far as these notes go: maps, arrays, strings, integers and booleans."""

    def __init__(self, data: bytes) -> None:
        self._data, self._at = data, 0

    def value(self) -> Any:
        tag = self._take(1)[0]
        if tag <= 0x7F:
            return tag
        if tag <= 0x8F:
            return self._map(tag & 0x0F)
        if tag <= 0x9F:
            return self._array(tag & 0x0F)
        if tag <= 0xBF:
            return self._text(tag & 0x1F)
        if tag in (0xC2, 0xC3):
            return tag == 0xC3
        if 0xCC <= tag <= 0xCF:
            return self._number(tag - 0xCC)
        if 0xD9 <= tag <= 0xDB:
            return self._text(self._number(tag - 0xD9))
        if tag in (0xDC, 0xDD):
            return self._array(self._number(tag - 0xDC + 1))
        if tag in (0xDE, 0xDF):
            return self._map(self._number(tag - 0xDE + 1))
        raise BuildError(f"Damaged code object: its note has a value of the unknown type {tag:#x}.")

    def _take(self, size: int) -> bytes:
        found = self._data[self._at : self._at + size]
        if len(found) != size:
            raise BuildError("Damaged code object: its note ends too early.")
        self._at += size
        return found

    def _number(self, power: int) -> int:
        return int.from_bytes(self._take(1 << power), "big")

    def _text(self, size: int) -> str:
        return self._take(size).decode()

    def _array(self, size: int) -> list[Any]:
        return [self.value() for _ in range(size)]

    def _map(self, size: int) -> dict[Any, Any]:
        return {self.value(): self.value() for _ in range(size)}
