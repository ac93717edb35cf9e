"""Gradients by tiles in float32 on GPUs, without tensor cores: their config.

Two kernels make them: one keeps queries and walks over the keys, the other keeps keys and walks over the queries.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from rpe_tvm.plan.config import fields_from_json, fields_to_json
from rpe_tvm.plan.gpu import gpu_bucket
from rpe_tvm.plan.gpu_direct import MAX_SHARED_BYTES, WARP, round_up
from rpe_tvm.plan.gpu_tiles import AMPERE_SHARED_BYTES, MOST_REGISTERS

FOUR = 4  # what a thread loads at once
WALKED, KEPT = 8, 4  # rows of a tile, and kept ones, whose pairs one thread makes
ROWS, COLUMNS = 8, 4  # kept rows and columns that one thread sums up
PAIR_PADDING = 16  # floats behind four rows of pairs


@dataclass(frozen=True)
class Share:
    """How the threads of a block share the sums of all kept rows and of some columns.

    Attributes
    ----------
    groups : int
        Groups of warps that have sums of their own, each of its part of a tile's rows: they add them up at the end.
    warps : int
        Warps of a group.
    panels : int
        Sets of `ROWS` x `COLUMNS` sums of a thread.
    columns : int
        Columns that are not more than zeros, rounded up to `FOUR`.
    """

    groups: int
    warps: int
    panels: int
    columns: int

    @property
    def sums(self) -> int:
        """Sums of a thread."""
        return self.panels * ROWS * COLUMNS

    @property
    def partial_floats(self) -> int:
        """Sums of all groups but the first."""
        return (self.groups - 1) * self.warps * WARP * self.sums


@dataclass(frozen=True)
class TileBackwardConfig:
    """What one compiled operator computes, and in which tiles.

    Parameters
    ----------
    num_features, head_dim : int
        Features m and channels d of a head.
    length : int
        Bucket length P, a power of two: features lie in rows of so many positions.
    rows : int
        Queries or keys that a block keeps.
    tile : int
        Rows that a block loads at once and walks over.
    blocks : int
        Blocks that one multiprocessor shall hold at once: bounds the registers of a thread.
    """

    num_features: int
    head_dim: int
    length: int
    rows: int = 64
    tile: int = 64
    blocks: int = 2

    op: ClassVar[str] = "backward"
    dtype: ClassVar[str] = "float32"
    grad_parts: ClassVar[int] = 1  # of a feature's gradient, see `te.gpu_gradients`
    stages: ClassVar[int] = 2  # tiles in shared memory: one in use, the other on its way

    def __post_init__(self) -> None:
        for field in ("num_features", "head_dim", "blocks"):
            if getattr(self, field) < 1:
                raise ValueError(f"Invalid {field}: expected a positive number, got {getattr(self, field)}.")
        for field in ("rows", "tile"):
            if getattr(self, field) not in (32, 64, 128):
                raise ValueError(f"Invalid {field}: expected 32, 64 or 128, got {getattr(self, field)}.")
        if self.length < max(self.rows, self.tile) or self.length & (self.length - 1):
            raise ValueError(
                f"Invalid length: expected a power of two of at least {max(self.rows, self.tile)}, got {self.length}."
            )
        if self.threads > 1024:
            raise ValueError(f"Invalid tile: expected rows * tile <= 32768, got {self.rows} x {self.tile}.")
        most = min(MOST_REGISTERS, 65536 // (self.threads * self.blocks))
        if self.registers > most:
            raise ValueError(
                f"Too many registers: expected at most {most} for sums and pairs of a thread, got {self.registers}; "
                "take fewer blocks or rows."
            )
        if self.shared_bytes > MAX_SHARED_BYTES:
            raise ValueError(
                f"Too much shared memory: expected at most {MAX_SHARED_BYTES} bytes, got {self.shared_bytes}; take a "
                f"smaller tile."
            )

    @property
    def name(self) -> str:
        """Readable name of the compiled operator, one per bucket."""
        return f"backward-m{self.num_features}-d{self.head_dim}-n{self.length}-{self.dtype}"

    @property
    def description(self) -> str:
        """One short word for tables: the algorithm with its tile."""
        return f"direct {self.rows}x{self.tile}"

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return self.rows * self.tile // (KEPT * WALKED)

    @property
    def at_once(self) -> int:
        """Turns of a loop that nvcc sees as one: it loads for the next while it multiplies.

        Where there are few tiles the longer code takes more time to arrive than that saves.
        """
        return 2 if self.length <= 512 else 4

    @property
    def features(self) -> int:
        """Features in shared memory, zero from `num_features` on."""
        return round_up(self.num_features, FOUR)

    @property
    def channels(self) -> int:
        """Channels in shared memory, zero from `head_dim` on."""
        return round_up(self.head_dim, FOUR)

    def share(self, columns: int) -> Share:
        """Return how threads share the sums of some columns."""
        span = min(8, self.rows // ROWS)  # groups of kept rows in a warp; the other lanes have other columns
        needed = self.rows // ROWS // span * -(-columns // FOUR * span // WARP)
        warps = self.threads // WARP
        groups = 1
        while 2 * groups * needed <= warps and self.tile % (2 * groups * FOUR) == 0:
            groups *= 2
        of_group = min(needed, warps // groups)
        return Share(groups, of_group, -(-needed // of_group), round_up(columns, FOUR))

    @property
    def registers(self) -> int:
        """Registers of a thread's sums, and of its pairs or of what it multiplies."""
        shares = [self.share(columns) for columns in (self.features, self.channels)]
        return sum(share.sums for share in shares) + max(WALKED * KEPT + 12, ROWS + max(s.sums for s in shares) // 2)

    @property
    def kept_floats(self) -> tuple[int, int]:
        """Shared memory of the features and channels of kept rows."""
        return in_fours(self.features, self.rows), in_fours(self.rows, self.channels)

    @property
    def stage_places(self) -> tuple[int, int, int, int]:
        """Where in a stage channels, the weights of all its offsets and the rows' two terms begin, and where it ends.

        In floats; features begin it. Only the kernel that keeps keys has the terms, and sums along diagonals where the
        channels were.
        """
        channels = in_fours(self.features, self.tile)
        weights = channels + max(in_fours(self.tile, self.channels), 16 * self.diagonal_stride)
        terms = weights + self.rows + self.tile
        return channels, weights, terms, terms + 2 * self.tile

    @property
    def stage_bytes(self) -> int:
        """Shared memory of one tile."""
        return 4 * self.stage_places[-1]

    @property
    def pair_floats(self) -> int:
        """Shared memory of a number for each pair of a tile."""
        return in_fours(self.tile, self.rows, PAIR_PADDING)

    @property
    def diagonal_stride(self) -> int:
        """Distance of two of a thread's 16 sums along diagonals: 8 more, so that readers meet no bank twice."""
        return self.threads + 8

    @property
    def places(self) -> tuple[int, int, int, int, int]:
        """Where behind the stages kept features, kept channels, pairs and the terms of kept rows begin, and the end.

        In bytes. Where the stages are, sums of groups of warps are added at the end. In the place of the terms of
        queries the kernel that keeps keys has the sums along diagonals that two tiles share, of two tiles in turns.
        """
        partial = max(self.share(columns).partial_floats for columns in (self.features, self.channels))
        features = max(self.stages * self.stage_bytes, 4 * partial, 4 * self.kept_floats[1])
        channels = features + 4 * self.kept_floats[0]
        pairs = channels + 4 * self.kept_floats[1]
        terms = pairs + 4 * self.pair_floats
        return features, channels, pairs, terms, terms + 8 * self.rows

    @property
    def shared_bytes(self) -> int:
        """Dynamic shared memory of a block."""
        return self.places[-1]

    @property
    def diagonals(self) -> tuple[int, int]:
        """Shape of a head's sums along diagonals, of all blocks: offset t is at P + t - (first key of the block)."""
        return self.length // self.rows, self.length + self.rows

    def to_json(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        return fields_to_json(self)

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> TileBackwardConfig:
        """Return the config that `to_json` wrote."""
        return cls(**fields_from_json(fields))


def in_fours(rows: int, width: int, padding: int = FOUR) -> int:
    """Return the floats of rows of which four follow each other, and then some padding.

    Threads that read the same column of every fourth row, 16 bytes each, then read different banks.
    """
    return rows * width + rows // FOUR * padding


def choose(n: int, num_features: int, head_dim: int, shared_bytes: int = AMPERE_SHARED_BYTES) -> TileBackwardConfig:
    """Return the default config for up to `n` positions, on GPUs whose blocks may have `shared_bytes` of shared memory.

    What sm_80 has is enough for all newer ones of its kind, so no more than that is taken.

    Raises
    ------
    ValueError
        If the sums of a block do not fit into registers or shared memory.
    """
    length = gpu_bucket(n)
    # few rows: larger blocks, so that there are warps for all multiprocessors; fewer: more blocks. These were the
    # fastest of five on an H100 (8 heads, m = 32, d = 64), but at 2048, where 64 x 64 took 823 us in place of 864: its
    # sums over keys and queries are twice as long, and the values' gradient lost more than twice what torch loses.
    fastest = (32, 128, 1) if 128 <= length <= 512 else (64, 128, 1) if length > 512 else (64, 64, 2)
    for rows, tile, blocks in (fastest, (64, 64, 1), (32, 64, 1), (64, 32, 1), (32, 32, 1)):
        try:
            config = TileBackwardConfig(num_features, head_dim, length, rows, tile, blocks)
        except ValueError:
            continue
        if config.shared_bytes <= min(shared_bytes, AMPERE_SHARED_BYTES):
            return config
    raise ValueError(
        f"Too large for tiles: expected sums of 32 keys that fit into registers, got head_dim {head_dim} and "
        f"num_features {num_features}; gradients by FFT serve these."
    )
