"""How the kernels of a function are launched, as JSON values: read from the host code that TVM makes of it.

A rule for a number is an integer, the name of a size, or ``[operator, rule, rule]``; `rpe_tvm.runtime.launch_rules`
computes it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import tvm
from tvm import tirx

from rpe_tvm.errors import BuildError

Rule = Any  # int, str, or [str, Rule, Rule]

_OPERATORS = {
    tirx.Add: "+",
    tirx.Sub: "-",
    tirx.Mul: "*",
    tirx.FloorDiv: "//",
    tirx.FloorMod: "%",
    tirx.Min: "min",
    tirx.Max: "max",
}
_AXES = {f"{kind}Idx.{axis}": (kind, number) for kind in ("block", "thread") for number, axis in enumerate("xyz")}


def arguments_of(function: tvm.tirx.PrimFunc) -> list[dict[str, Any]]:
    """The parameters of a function in order.

    Returns
    -------
    list of dict
        Of a tensor ``name``, ``dtype``, ``shape`` and, where it need not be compact, ``strides``, in elements; of an
        integer ``name`` and ``dtype``.
    """
    found = []
    for parameter in function.params:
        if not isinstance(parameter.ty, tirx.BufferType):
            found.append({"name": str(parameter.name), "dtype": str(parameter.ty.dtype)})
            continue
        of: dict[str, Any] = {
            "name": str(parameter.name),
            "dtype": str(parameter.dtype),
            "shape": [_rule(s, {}) for s in parameter.shape],
        }
        if parameter.strides:
            of["strides"] = [_rule(stride, {}) for stride in parameter.strides]
        found.append(of)
    return found


def kernels_of(host: tvm.tirx.PrimFunc, tensors: frozenset[str]) -> list[dict[str, Any]]:
    """The kernels that a function launches once for each call, in order.

    Parameters
    ----------
    host
        Its host code, as TVM splits it off, with calls of kernels by name.
    tensors
        Names of its tensors.

    Returns
    -------
    list of dict
        ``name``; ``arguments``: each the name of a tensor, whose address it is, or the rule of an integer; ``grid`` and
        ``block``: three rules each, x first.

    Raises
    ------
    BuildError
        If launches depend on anything but sizes.
    """
    found, lets = [], dict[str, Any]()
    for statement in _statements(host.body):
        if isinstance(statement, tirx.Bind):
            lets[str(statement.var.name)] = statement.value
        call = getattr(statement, "value", None)
        if isinstance(statement, tirx.Evaluate) and _name_of(call) == "tirx.call_ffi_kernel":
            found.append(_kernel(call, lets, tensors))
    return found


def _kernel(call: Any, lets: dict[str, Any], tensors: frozenset[str]) -> dict[str, Any]:
    axes = [str(axis) for axis in call.attrs.launch_params]
    name, *arguments = call.args
    extents = {"block": [1, 1, 1], "thread": [1, 1, 1]}
    for axis, extent in zip(axes, arguments[len(arguments) - len(axes) :], strict=True):
        if axis not in _AXES:
            raise BuildError(
                f"The kernel {name.value} is launched with {axis}, which has no rule: expected a fixed size."
            )
        kind, number = _AXES[axis]
        extents[kind][number] = _rule(extent, lets)
    return {
        "name": str(name.value),
        "arguments": [_argument(each, lets, tensors) for each in arguments[: len(arguments) - len(axes)]],
        "grid": extents["block"],
        "block": extents["thread"],
    }


def _argument(value: Any, lets: dict[str, Any], tensors: frozenset[str]) -> Rule:
    if _name_of(value) != "tirx.buffer_data":
        return _rule(value, lets)
    name = str(value.args[0].name)
    if name not in tensors:
        raise BuildError(f"A kernel reads {name}, which is no tensor of its function: {', '.join(sorted(tensors))}.")
    return name


def _statements(body: Any) -> Iterator[Any]:
    """The statements that run once, in order; nothing inside of loops and branches."""
    if isinstance(body, tirx.SeqStmt):
        for each in body.seq:
            yield from _statements(each)
    else:
        yield body
        if isinstance(body, tirx.AttrStmt):
            yield from _statements(body.body)


def _rule(value: Any, lets: dict[str, Any]) -> Rule:
    if isinstance(value, tirx.IntImm):
        return int(value.value)
    if isinstance(value, tirx.Var):
        name = str(value.name)
        known = lets.get(name)
        # what is read from an argument is a size of its own name
        return name if known is None or _name_of(known) is not None else _rule(known, lets)
    for kind, operator in _OPERATORS.items():
        if isinstance(value, kind):
            return [operator, _rule(value.a, lets), _rule(value.b, lets)]
    raise BuildError(f"A launch depends on {value}, which has no rule: expected arithmetic of sizes.")


def _name_of(value: Any) -> str | None:
    """The name of the function that is called, None if nothing is."""
    return str(value.op.name) if isinstance(value, tvm.ir.Call) and hasattr(value.op, "name") else None
