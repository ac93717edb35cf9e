"""Reads assembly as LLVM writes it: the innermost loops of compiled code, and what their instructions do."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

import tvm

from rpe_tvm.build.stack_arrays import compile_for
from rpe_tvm.targets import TargetSpec, to_tvm

_LABEL = re.compile(r"([.\w$]+):")
# a jump to a label: b.ne .LBB0_1, cbz x1, .LBB0_1, tbnz w1, #3, .LBB0_1, bne .LBB0_1, jne .LBB0_1
_JUMP = re.compile(r"(?:b|cb|tb|j)[\w.]*\s+(?:.*,\s*)?(\.L[\w$]+)$")


@dataclass(frozen=True)
class Loop:
    """An innermost loop.

    Parameters
    ----------
    function : str
        The function that it is in.
    label : str
        Where it begins.
    instructions : tuple of str
        Its instructions in order, mnemonic and operands.
    """

    function: str
    label: str
    instructions: tuple[str, ...]

    def count(self, pattern: str) -> int:
        """Return how many instructions match a regular expression from their beginning."""
        return sum(re.match(pattern, instruction) is not None for instruction in self.instructions)


def assembly_of(function: tvm.tirx.PrimFunc, target: TargetSpec) -> str:
    """Return what a scheduled function is compiled to."""
    name = str(function.attrs["global_symbol"])
    text: str = compile_for(tvm.IRModule({name: function}), to_tvm(target)).inspect_source("asm")
    return text


def innermost_loops(assembly: str) -> list[Loop]:
    """Return the loops that contain no other one: from a label to the last jump back to it."""
    found = []
    for function, lines in _functions(assembly):
        places = {label: at for at, (label, _) in enumerate(lines) if label}
        ends: dict[int, int] = {}
        for at, (_, instruction) in enumerate(lines):
            jump = _JUMP.match(instruction)
            if jump and places.get(jump[1], at + 1) <= at:
                ends[places[jump[1]]] = at
        for start, end in ends.items():
            if not any(start < other <= end for other in ends):
                inside = tuple(instruction for _, instruction in lines[start : end + 1] if instruction)
                found.append(Loop(function, lines[start][0], inside))
    return found


def _functions(assembly: str) -> Iterator[tuple[str, list[tuple[str, str]]]]:
    """Yield (name, lines) of each function; a line is a label or an instruction, the other one is empty."""
    names = set(re.findall(r"\.type\s+([\w$.]+),\s*[@%]function", assembly))
    name, lines = "", list[tuple[str, str]]()
    for line in assembly.splitlines():
        text = re.split(r"//|\s@ |\s# ", line)[0].strip()
        label = _LABEL.fullmatch(text)
        if label and label[1] in names:
            if name:
                yield name, lines
            name, lines = label[1], []
        elif label:
            lines.append((label[1], ""))
        elif text and not text.startswith("."):
            lines.append(("", re.sub(r"\s+", " ", text)))
    if name:
        yield name, lines
