"""Computes sizes of a call and of launches from the rules of a manifest, see `rpe_tvm.build.launch_rules`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rpe_tvm.errors import DTypeError, ShapeError

_OPERATORS: dict[str, Callable[[int, int], int]] = {
    "+": lambda a, b: a + b,
    "-": lambda a, b: a - b,
    "*": lambda a, b: a * b,
    "//": lambda a, b: a // b,
    "%": lambda a, b: a % b,
    "min": min,
    "max": max,
}


def value(rule: Any, sizes: Mapping[str, int]) -> int:
    """Return the number that a rule stands for: an integer, the name of a size, or ``[operator, rule, rule]``."""
    if isinstance(rule, int):
        return rule
    if isinstance(rule, str):
        return sizes[rule]
    operator, left, right = rule
    return _OPERATORS[operator](value(left, sizes), value(right, sizes))


def sizes_of(function: str, parameters: Sequence[Mapping[str, Any]], arguments: Sequence[Any]) -> dict[str, int]:
    """Return the sizes that the arguments of a call have, all of them checked.

    Parameters
    ----------
    function
        Its name, for messages.
    parameters
        Of the manifest: name, dtype and, of a tensor, shape and strides.
    arguments
        Tensors with the methods of torch's, and integers.

    Raises
    ------
    TypeError
        For a wrong number of arguments.
    DTypeError, ShapeError
        If an argument has another dtype or shape than expected, or lies in memory in another way.
    """
    if len(arguments) != len(parameters):
        names = ", ".join(str(each["name"]) for each in parameters)
        raise TypeError(
            f"Invalid call of {function}: expected {len(parameters)} arguments ({names}), got {len(arguments)}."
        )
    sizes: dict[str, int] = {}
    for parameter, argument in zip(parameters, arguments, strict=True):
        if "shape" not in parameter:
            sizes[parameter["name"]] = int(argument)
            continue
        _check_kind(function, parameter, argument)
        rules = [*zip(parameter["shape"], argument.shape, strict=True)]
        rules += zip(parameter.get("strides", ()), argument.stride(), strict=False)
        for rule, size in rules:
            if isinstance(rule, str):
                sizes.setdefault(rule, int(size))
    for parameter, argument in zip(parameters, arguments, strict=True):
        if "shape" in parameter:
            _check_places(function, parameter, argument, sizes)
    return sizes


def _check_kind(function: str, parameter: Mapping[str, Any], argument: Any) -> None:
    name, dtype = parameter["name"], str(argument.dtype).removeprefix("torch.")
    if dtype != parameter["dtype"]:
        raise DTypeError(f"Invalid {name} of {function}: expected {parameter['dtype']}, got {dtype}. Convert it.")
    if len(argument.shape) != len(parameter["shape"]):
        raise ShapeError(
            f"Invalid {name} of {function}: expected {len(parameter['shape'])} axes, got shape {tuple(argument.shape)}."
        )


def _check_places(function: str, parameter: Mapping[str, Any], argument: Any, sizes: Mapping[str, int]) -> None:
    name = parameter["name"]
    expected = tuple(value(rule, sizes) for rule in parameter["shape"])
    if tuple(argument.shape) != expected:
        raise ShapeError(
            f"Invalid {name} of {function}: expected shape {expected}, as its other arguments have it, got "
            f"{tuple(argument.shape)}."
        )
    if "strides" in parameter:
        strides = tuple(value(rule, sizes) for rule in parameter["strides"])
        fits = all(size == 1 or a == b for size, a, b in zip(expected, strides, argument.stride(), strict=True))
    else:
        fits = argument.is_contiguous()
    if not fits:
        raise ShapeError(
            f"Invalid {name} of {function}: expected {'a contiguous last axis' if 'strides' in parameter else 'it'} "
            f"contiguous, got strides {tuple(argument.stride())} of shape {expected}. Use .contiguous()."
        )
