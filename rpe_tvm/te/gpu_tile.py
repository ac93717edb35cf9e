"""Sums of outer products in float32: how a warp shares rows and columns, and how tiles get into shared memory.

The lanes of a warp are 4 x 8; a lane keeps pieces of 4 rows and of 4 columns. For one term of a sum it loads a piece of
each operand by one instruction, so both operands lie in shared memory with the sum's index first: `[term, row]`.
A load of 16 bytes is served by halves of the warp, and at once where neighbours ask for the same: rows change with bits
0 and 4 of the lane's number, columns with the bits between.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

from tvm.script import tirx as T

from rpe_tvm.plan.gpu_direct import CHUNK_BYTES, WARP
from rpe_tvm.plan.gpu_tiles import COLUMNS, FLOAT_BYTES, PIECE, ROWS
from rpe_tvm.te import cuda_warp as warp
from rpe_tvm.te.cuda_function import let
from rpe_tvm.te.cuda_tile import Place, share
from rpe_tvm.te.cuda_warp import Buffer, Expr

# Terms of a sum without a branch between them.
UNROLLED = 8
# Bits of a lane's number that tell columns apart.
COLUMN_BITS = (2, 4, 8)


class Lane(Place):
    """Its place in a block and in the 4 x 8 lanes of its warp."""

    def __init__(self, warps_q: int, row_pieces: int, thread: Expr) -> None:
        super().__init__(warps_q, row_pieces, thread)
        self.of_rows = let("of_rows", self.lane % 2 + self.lane // 16 * 2)
        self.of_columns = let("of_columns", self.lane // 2 % 8)


def row_of(i: Any) -> Any:
    """Return a lane's row number `i`, counted from its first: the pieces of four lie apart."""
    return i // PIECE * ROWS + i % PIECE


def column_of(i: Any) -> Any:
    """Return a lane's column number `i`, counted from its first."""
    return i // PIECE * COLUMNS + i % PIECE


@dataclass(frozen=True)
class Operand:
    """One side of a sum of outer products, in shared memory.

    Attributes
    ----------
    address
        Of the lane's first number.
    pieces, piece_bytes
        How many pieces of four numbers the lane has, and their distance.
    term_bytes
        Distance of the terms of the sum.
    turn_bytes
        Distance of the first terms of two turns; 0: as the terms before.
    """

    address: Expr
    pieces: int
    piece_bytes: int
    term_bytes: int
    turn_bytes: int = 0


def rows(address: Expr, pieces: int, term_bytes: int, turn_bytes: int = 0) -> Operand:
    """Return the left operand: a lane's rows."""
    return Operand(address, pieces, ROWS * FLOAT_BYTES, term_bytes, turn_bytes)


def columns(address: Expr, pieces: int, term_bytes: int, turn_bytes: int = 0) -> Operand:
    """Return the right operand: a lane's columns."""
    return Operand(address, pieces, COLUMNS * FLOAT_BYTES, term_bytes, turn_bytes)


Keeps = Callable[[Expr, Expr, Expr], Expr]


def outer_products(
    sums: Buffer, left: Operand, right: Operand, terms: int, turns: int = 1, keeps: Keeps | None = None
) -> None:
    """Add the outer products of `turns` times `terms` terms to `sums`, the lane's rows x columns in registers.

    Parameters
    ----------
    sums
        Element `row * columns + column`.
    left, right : Operand
        The rows and the columns.
    terms, turns : int
        Terms of a turn: no branch is between them.
    keeps : callable or None
        (turn, term, row) -> whether the row takes part, where not all do: what it would add may be NaN.
    """
    height, width = PIECE * left.pieces, PIECE * right.pieces
    a, b = warp.registers(height, "float32"), warp.registers(width, "float32")

    def load(target: Buffer, operand: Operand, turn: Expr, term: Expr) -> None:
        turn_bytes = operand.turn_bytes or terms * operand.term_bytes
        address = let("address", operand.address + warp.uint32(turn * turn_bytes + term * operand.term_bytes))
        for piece in range(operand.pieces):
            warp.load_four(target, PIECE * piece, address, piece * operand.piece_bytes)

    with T.serial(turns) as turn, T.unroll(terms) as term:
        load(a, left, turn, term)
        load(b, right, turn, term)
        with T.unroll(height) as row:
            guard = nullcontext() if keeps is None else _if(keeps(turn, term, row))
            with guard, T.unroll(width) as column:
                at = row * width + column
                T.buffer_store(sums, sums[at] + a[row] * b[column], [at])


def sum_of_products(sums: Buffer, left: Operand, right: Operand, terms: int) -> None:
    """Add the outer products of `terms` terms to `sums`, as `outer_products`."""
    turns, rest = divmod(terms, UNROLLED)
    if turns:
        outer_products(sums, left, right, UNROLLED, turns)
    if rest:
        last_left, last_right = (
            replace(each, address=each.address + T.uint32(turns * UNROLLED * each.term_bytes)) for each in (left, right)
        )
        outer_products(sums, last_left, last_right, rest)


@contextmanager
def _if(condition: Expr) -> Iterator[None]:
    with T.If(condition), T.Then():
        yield


def copy_features(
    threads: int, thread: Expr, phi: Buffer, b: Expr, h: Expr, first: Expr, count: int, target: Expr
) -> None:
    """Start the copies of `count` positions of phi, `[B, H, m, P]`: they lie as `[m, count]`."""
    pieces = count // PIECE

    def copy(chunk: Expr) -> None:
        feature, piece = chunk // pieces, chunk % pieces
        pointer = phi.ptr_to([b, h, feature, first + piece * PIECE])
        warp.copy_async(target + warp.uint32(chunk * CHUNK_BYTES), pointer)

    share(threads, thread, int(phi.shape[2]) * pieces, copy)


def copy_strip(threads: int, thread: Expr, table: Buffer, h: Expr, first: Expr, count: int, target: Expr) -> None:
    """Start the copies of `count` weights of a head."""

    def copy(chunk: Expr) -> None:
        warp.copy_async(target + warp.uint32(chunk * CHUNK_BYTES), table.ptr_to([h, first + chunk * PIECE]))

    share(threads, thread, count // PIECE, copy)


def copy_rows(
    threads: int,
    thread: Expr,
    x: Buffer,
    b: Expr,
    h: Expr,
    first: Expr,
    count: int,
    target: Expr,
    row_bytes: int,
    column_bytes: int = FLOAT_BYTES,
) -> None:
    """Start the copies of `count` rows of x, `[B, H, n, d]`, with zeros for rows past the last.

    A column further on is `column_bytes` away. Rows may begin anywhere: where all are whole pieces of four numbers they
    come in these, else one by one.
    """
    left = let("left", T.Cast("int32", x.shape[2] - first))

    def copy_numbers() -> None:
        lane, of_warp = let("column", thread % WARP), let("row", thread // WARP)
        to = let("to", target + warp.uint32(of_warp * row_bytes + lane * column_bytes))
        for row in range(0, count, threads // WARP):
            for column in range(0, int(x.shape[3]), WARP):
                pointer = x.ptr_to([b, h, first + of_warp + row, lane + column])
                offset = T.uint32(row * row_bytes + column * column_bytes)
                with T.If(T.And(of_warp + row < count, lane + column < x.shape[3])), T.Then():
                    warp.copy_float_async(to + offset, pointer, of_warp + row >= left)

    def copy_piece(chunk: Expr) -> None:
        pieces = int(x.shape[3]) // PIECE
        row, piece = chunk // pieces, chunk % pieces
        pointer = x.ptr_to([b, h, first + row, piece * PIECE])
        warp.copy_async(target + warp.uint32(row * row_bytes + piece * CHUNK_BYTES), pointer, row >= left)

    whole = in_pieces(x) if column_bytes == FLOAT_BYTES else None
    if whole is None:
        copy_numbers()
        return
    with T.If(whole):
        with T.Then():
            share(threads, thread, count * (int(x.shape[3]) // PIECE), copy_piece)
        with T.Else():
            copy_numbers()


def in_pieces(x: Buffer) -> Expr | None:
    """Return whether all rows of x are whole pieces of four numbers at multiples of 16 bytes; None: they never are."""
    if int(x.shape[3]) % PIECE:
        return None
    whole = T.reinterpret("uint64", x.ptr_to([0, 0, 0, 0])) % T.uint64(CHUNK_BYTES) == T.uint64(0)
    for stride in x.strides[:3]:
        whole = T.And(whole, stride % PIECE == 0)
    return whole
