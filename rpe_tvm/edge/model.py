"""Writes a whole model for devices without Python: one library, its weights, and the order of its calls.

The model comes as a `torch.export.ExportedProgram`. TVM's own import turns it into tensor functions, attention goes to
our kernels, and both are compiled into one library. What is left is a list of calls on fixed buffers, which the C++
host in ``deploy/model`` reads.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from rpe_tvm.edge import archive, arena, contents, licence
from rpe_tvm.edge.package import needed_glibc, package_versions, template
from rpe_tvm.errors import BuildError
from rpe_tvm.plan import twiddles, wisdom
from rpe_tvm.plan.config import AttentionConfig
from rpe_tvm.targets import TargetSpec

if TYPE_CHECKING:
    import tvm

FORMAT = 1
FILE = "model.txt"
LIBRARY, WEIGHTS, EXAMPLE = "lib.so", "weights.bin", "example.bin"

_ALIGNMENT = 64


@dataclass
class _Program:
    """Tensors and calls, as they are found.

    Attributes
    ----------
    tensors
        dtype and shape of each.
    weights
        The content of the file of weights.
    starts
        Tensor -> where it starts there, for those that are weights.
    calls
        Function and arguments; numbers are tensors, strings are integers.
    inputs, outputs
        The numbers of the tensors that are set before a run, and read after it.
    configs
        The attention operators that are called, by the prefixes of their functions' names.
    tables
        The constant tables of each.
    """

    tensors: list[tuple[str, tuple[int, ...]]] = field(default_factory=list)
    weights: bytearray = field(default_factory=bytearray)
    starts: dict[int, int] = field(default_factory=dict)
    calls: list[tuple[str, tuple[int | str, ...]]] = field(default_factory=list)
    inputs: list[int] = field(default_factory=list)
    outputs: list[int] = field(default_factory=list)
    configs: dict[str, AttentionConfig] = field(default_factory=dict)
    tables: dict[str, int] = field(default_factory=dict)

    def weight(self, array: npt.NDArray[Any]) -> int:
        """Add a constant and return its number."""
        number = self.scratch(str(array.dtype), array.shape)
        self.starts[number] = len(self.weights)
        self.weights += np.ascontiguousarray(array).tobytes()
        self.weights += bytes(-len(self.weights) % _ALIGNMENT)
        return number

    def scratch(self, dtype: str, shape: Sequence[int]) -> int:
        """Add an input or an intermediate result and return its number."""
        if dtype not in ("float32", "int32", "int64", "bool"):
            raise BuildError(f"The model has a tensor of {dtype}: expected float32, int32, int64 or bool. Convert it.")
        self.tensors.append((dtype, tuple(shape)))
        return len(self.tensors) - 1

    def call(self, function: str, *arguments: int | str) -> None:
        """Add a call."""
        self.calls.append((function, arguments))

    def lines(self) -> list[str]:
        """The lines of ``model.txt`` about tensors and calls."""
        scratch = [number for number in range(len(self.tensors)) if number not in self.starts]
        buffers = self._buffers(scratch)
        places = dict(zip(scratch, arena.place(buffers), strict=True))
        size = max((start + each.size for start, each in zip(places.values(), buffers, strict=True)), default=0)
        lines = [f"arena {size}"]
        for number, (dtype, shape) in enumerate(self.tensors):
            place = f"weight {self.starts[number]}" if number in self.starts else f"scratch {places[number]}"
            lines.append(f"tensor {number} {place} {dtype} {len(shape)} {' '.join(map(str, shape))}".rstrip())
        lines += [f"input {number}" for number in self.inputs]
        for function, arguments in self.calls:
            words = [f"t{each}" if isinstance(each, int) else f"i{each}" for each in arguments]
            lines.append(f"call {function} {' '.join(words)}")
        return lines + [f"output {number}" for number in self.outputs]

    def _buffers(self, scratch: Sequence[int]) -> list[arena.Buffer]:
        """Size of each buffer, and when it is needed: inputs and outputs always, so that a model can run again."""
        kept = {*self.inputs, *self.outputs}
        found = []
        for number in scratch:
            dtype, shape = self.tensors[number]
            size = -(-math.prod(shape) * np.dtype(dtype).itemsize // _ALIGNMENT) * _ALIGNMENT
            uses = [at for at, (_, arguments) in enumerate(self.calls) if number in arguments]
            if number in kept or not uses:
                uses = [0, len(self.calls)]
            found.append(arena.Buffer(size, uses[0], uses[-1]))
        return found


def export_model(
    program: Any, target: TargetSpec, out: str | os.PathLike[str], threads: Literal["openmp", "none"] = "openmp"
) -> Path:
    """Compile a model and write an archive with its library, its weights and a C++ host.

    The archive also has the inputs that the program was exported with, and what it computes for them, so that the host
    can check itself on a device.

    Parameters
    ----------
    program
        A `torch.export.ExportedProgram` with fixed sizes. Its attention is that of
        `rpe_tvm.torch.kernelized_attention`; everything else may be what TVM's Relax imports.
    target
        The CPU to compile for.
    out
        The archive to write, ``*.tar.gz``.
    threads
        As of `rpe_tvm.edge.package`. Attention and matrix products use threads.

    Raises
    ------
    BuildError
        If TVM does not import the model, or something does not compile.
    """
    from rpe_tvm.build import lower, relax_import

    mod = relax_import.import_model(program)
    found = _Program()
    _walk(mod, target, found)
    functions = {str(name.name_hint): f for name, f in mod.functions.items() if name.name_hint != "main"}
    functions = {name: f.with_attr("global_symbol", name) for name, f in functions.items()}
    for prefix, config in found.configs.items():
        for function in lower.lower(config, target).mod.functions.values():
            symbol = f"{prefix}_{function.attrs['global_symbol']}"
            functions[symbol] = function.with_attr("global_symbol", symbol)
    library = _compile(functions, target, threads)
    files = template("model")
    shared = template("bundle")
    files |= {f"src/{Path(path).name}": shared[path] for path in shared if Path(path).stem in _SHARED}
    files[LIBRARY], files[WEIGHTS], files[EXAMPLE] = library, bytes(found.weights), _example(program)
    features = ",".join(target.features) or "-"
    versions = " ".join(f"{name} {version}" for name, version in package_versions().items())
    lines = [
        f"rpe_tvm-model {FORMAT}",
        f"versions {versions}",
        f"variant {target.id} {target.machine} {needed_glibc([library])} {threads} {features}",
        f"library {len(library)} {hashlib.sha256(library).hexdigest()} {LIBRARY}",
        f"weights {len(found.weights)} {hashlib.sha256(found.weights).hexdigest()} {WEIGHTS}",
        *found.lines(),
    ]
    files[FILE] = contents.sign("".join(f"{line}\n" for line in lines)).encode()
    files[licence.FILE] = licence.text().encode()
    files[contents.SUMS] = contents.sums(files).encode()
    return archive.pack(Path(out), "rpe_tvm-model", files)


# Parts of the host of bundles that the host of models has, too.
_SHARED = ("manifest", "library", "cpu", "error", "sha256", "kernel_abi")


def _walk(mod: tvm.IRModule, target: TargetSpec, program: _Program) -> None:
    """Fill `program` with what the model's function does."""
    from tvm import ir, relax

    main = mod["main"]
    numbers: dict[Any, int] = {}
    for parameter in main.params:
        numbers[parameter] = program.scratch(*_type_of(parameter))
    program.inputs += numbers.values()

    def number_of(value: Any) -> int:
        if isinstance(value, ir.Constant):
            array = value.value.numpy()
            key = (array.tobytes(), str(array.dtype), array.shape)  # what several steps take is stored once
            if key not in numbers:
                numbers[key] = program.weight(array)
            return numbers[key]
        return numbers[value]

    for block in main.body.blocks:
        for binding in block.bindings:
            value = binding.value
            if isinstance(value, relax.Tuple):
                program.outputs = [number_of(each) for each in value.fields]
                numbers[binding.var] = -1
            elif isinstance(value, relax.Var | ir.Constant):
                numbers[binding.var] = number_of(value)
            elif isinstance(value, relax.Call) and str(value.op.name) in ("relax.call_tir", "relax.call_dps_packed"):
                callee, given = value.args[0], [number_of(each) for each in value.args[1].fields]
                numbers[binding.var] = made = program.scratch(*_type_of(binding.var))
                if str(value.op.name) == "relax.call_tir":
                    program.call(str(callee.name_hint), *given, made)
                else:
                    shapes = [tuple(map(int, _type_of(each)[1])) for each in value.args[1].fields]
                    _attention(str(callee.global_symbol), shapes, given, made, target, program)
            else:
                raise BuildError(f"The model has a step that has no fixed sizes or is no tensor function: {value}")
    program.outputs = program.outputs or [number_of(main.body.body)]


def _example(program: Any) -> bytes:
    """The inputs that a program was exported with, and what it computes for them, one after the other."""
    inputs, _ = program.example_inputs
    outputs = program.module()(*inputs)
    tensors = (*inputs, *(outputs if isinstance(outputs, tuple | list) else (outputs,)))
    return b"".join(tensor.detach().contiguous().numpy().tobytes() for tensor in tensors)


def _type_of(value: Any) -> tuple[str, list[int]]:
    """dtype and shape."""
    try:
        return str(value.ty.dtype), [int(size) for size in value.ty.shape]
    except (AttributeError, TypeError) as error:
        raise BuildError(
            f"The model has a value that is no tensor of fixed size: {value}. Export it without dynamic shapes."
        ) from error


def _attention(
    name: str,
    shapes: Sequence[Sequence[int]],
    given: Sequence[int],
    made: int,
    target: TargetSpec,
    program: _Program,
) -> None:
    """Add the calls of one attention, as `rpe_tvm.runtime.operator.run` makes them."""
    *_, feature_map, is_causal = name.split(".")
    query, key, value, rpe_bias, projection = given
    (batch, heads, n_query, head_dim), (_, _, n_key, _) = shapes[:2]
    num_features = shapes[4][0]
    config = wisdom.choose(target.id, max(n_query, n_key), num_features, head_dim, target.lanes)
    prefix = config.name.replace("-", "_")
    if prefix not in program.configs:
        program.configs[prefix] = config
        program.tables[prefix] = program.weight(twiddles.tables(config))
    tables = program.tables[prefix]
    phi_shape = twiddles.feature_shape(config, batch, heads, n_query, n_key)
    phi_q, phi_k = program.scratch("float32", phi_shape), program.scratch("float32", phi_shape)
    table = program.scratch("float32", twiddles.weight_table_shape(config, heads, n_query, n_key))
    program.call(f"{prefix}_features_{feature_map}", query, projection, phi_q)
    program.call(f"{prefix}_features_{feature_map}", key, projection, phi_k)
    program.call(f"{prefix}_weights", rpe_bias, str(n_query), str(n_key), is_causal, tables, table)
    program.call(f"{prefix}_attention", phi_q, phi_k, value, table, tables, made)


def _compile(functions: Mapping[str, Any], target: TargetSpec, threads: Literal["openmp", "none"]) -> bytes:
    """One library of all functions."""
    import tvm

    from rpe_tvm.build import compile as build
    from rpe_tvm.build import manifest

    artefact = build.compile_module(tvm.IRModule(dict(functions)), "model", {}, target, op="model", threads=threads)
    return (artefact / manifest.LIBRARY).read_bytes()
