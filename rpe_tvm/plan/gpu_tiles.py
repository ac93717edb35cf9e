"""The `direct` algorithm in float32 on NVIDIA GPUs, without tensor cores: its config.

Tensor cores multiply 11 bits of a float32 and truncate sums; here products and sums are those of float32.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from rpe_tvm.plan.config import fields_from_json, fields_to_json
from rpe_tvm.plan.gpu import gpu_bucket
from rpe_tvm.plan.gpu_direct import MAX_SHARED_BYTES, WARP, round_up

FLOAT_BYTES = 4
PIECE = 4  # neighbouring numbers that a lane loads from shared memory at once
ROWS, COLUMNS = 4 * PIECE, 8 * PIECE  # what the 4 x 8 lanes of a warp have with one piece each
AMPERE_SHARED_BYTES = 163 * 1024  # what one block may use on sm_80
# Of the 255 registers of a thread: the rest holds addresses and what is being loaded.
MOST_REGISTERS = 200
# What a row of weighted scores is longer than its queries: then no two lanes that store at once meet in a bank.
PADDING = 8


@dataclass(frozen=True)
class TileConfig:
    """What one compiled operator of `direct` in float32 computes, and in which tiles.

    Parameters
    ----------
    num_features : int
        Features m of the feature map.
    head_dim : int
        Channels d of query, key and value of a head.
    length : int
        Bucket length P, a multiple of both sides of a tile: the operator serves every n up to it.
    row_pieces, key_pieces : int
        Pieces of four queries and of four keys that a lane multiplies: a warp has 16 and 32 times as many.
    warps_q, warps_k : int
        Warps of a block side by side along the queries, and along the keys of a tile. Warps along the keys add up what
        they have at the end: they fill the GPU where there are few queries.
    stages : int
        Tiles in shared memory: one in use, the others on their way.
    blocks : int
        Blocks that one multiprocessor shall hold at once: bounds the registers of a thread; 0 leaves that to nvcc.
    dtype : {"float32"}
        Of query, key, value and out.
    """

    num_features: int
    head_dim: int
    length: int
    row_pieces: int = 2
    key_pieces: int = 1
    warps_q: int = 2
    warps_k: int = 4
    stages: int = 2
    blocks: int = 1
    dtype: Literal["float32"] = "float32"

    op: ClassVar[str] = "attention"

    def __post_init__(self) -> None:
        for field in ("num_features", "head_dim", "length", "row_pieces", "key_pieces", "warps_q", "warps_k"):
            if getattr(self, field) < 1:
                raise ValueError(f"Invalid {field}: expected a positive number, got {getattr(self, field)}.")
        if self.dtype != "float32":
            raise ValueError(f"Invalid dtype: expected 'float32', got {self.dtype!r}.")
        if self.stages < 2:
            raise ValueError(f"Invalid stages: expected at least 2, got {self.stages}.")
        if self.blocks < 0:
            raise ValueError(f"Invalid blocks: expected 0 or more, got {self.blocks}.")
        if self.length % self.tile_q or self.length % self.tile_k:
            raise ValueError(
                f"Invalid length: expected a multiple of the tile {self.tile_q} x {self.tile_k}, got {self.length}."
            )
        if PIECE * self.row_pieces % self.warps_k:
            rows = PIECE * self.row_pieces
            raise ValueError(f"Invalid warps_k: expected a divisor of the {rows} rows of a lane, got {self.warps_k}.")
        if self.threads > 1024:
            raise ValueError(f"Invalid warps: expected at most 32 in a block, got {self.warps_q * self.warps_k}.")
        if self.registers > MOST_REGISTERS:
            raise ValueError(
                f"Too large for registers: expected sums of at most {MOST_REGISTERS} registers, got {self.registers}; "
                "take fewer pieces, or the fft algorithm."
            )
        if self.shared_bytes > MAX_SHARED_BYTES:
            raise ValueError(
                f"Too much shared memory: expected at most {MAX_SHARED_BYTES} bytes, got {self.shared_bytes}; take "
                "fewer warps along the keys, or the fft algorithm."
            )

    @property
    def name(self) -> str:
        """Readable name of the compiled operator, one per bucket and dtype."""
        return f"attention-m{self.num_features}-d{self.head_dim}-n{self.length}-{self.dtype}"

    @property
    def description(self) -> str:
        """One short word for tables: the algorithm with its tile."""
        return f"direct {self.tile_q}x{self.tile_k}"

    @property
    def rows(self) -> int:
        """Queries of a warp."""
        return ROWS * self.row_pieces

    @property
    def keys(self) -> int:
        """Keys of a warp in each tile."""
        return COLUMNS * self.key_pieces

    @property
    def tile_q(self) -> int:
        """Queries of a block."""
        return self.rows * self.warps_q

    @property
    def tile_k(self) -> int:
        """Keys of a tile."""
        return self.keys * self.warps_k

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return WARP * self.warps_q * self.warps_k

    @property
    def channel_pieces(self) -> int:
        """Pieces of four channels of a lane."""
        return round_up(self.head_dim, COLUMNS) // COLUMNS

    @property
    def registers(self) -> int:
        """Registers of a lane's sums, of its scores, and of the operands of one product."""
        rows, keys, channels = (PIECE * pieces for pieces in (self.row_pieces, self.key_pieces, self.channel_pieces))
        return rows * (1 + keys + channels) + rows + max(keys, channels)

    @property
    def value_row_bytes(self) -> int:
        """Distance of two rows of value in shared memory."""
        return COLUMNS * FLOAT_BYTES * self.channel_pieces

    @property
    def score_row_bytes(self) -> int:
        """Distance of two rows of a warp's weighted scores in shared memory, `[key, query]`."""
        return (self.rows + PADDING) * FLOAT_BYTES

    @property
    def stage_bytes(self) -> int:
        """Shared memory of one tile: phi_k, value, and the weights of all offsets from the queries to its keys."""
        features = FLOAT_BYTES * self.num_features * self.tile_k
        return features + self.tile_k * self.value_row_bytes + FLOAT_BYTES * (self.tile_q + self.tile_k)

    @property
    def shared_bytes(self) -> int:
        """Dynamic shared memory of a block: the tiles, phi_q and the weighted scores of every warp."""
        queries = FLOAT_BYTES * self.num_features * self.tile_q
        scores = self.warps_q * self.warps_k * self.keys * self.score_row_bytes
        return max(self.stages * self.stage_bytes + queries + scores, self.partial_bytes)

    def table_shape(self, heads: int, n_query: int, n_key: int) -> tuple[int, int]:
        """Return the shape of the weights: c[t] at index t + round_up(n_query, tile_q), zero elsewhere."""
        return heads, round_up(n_query, self.tile_q) + round_up(n_key, self.tile_k)

    @property
    def partial_bytes(self) -> int:
        """Shared memory of the sums of all warps, where the tiles were before, if several share the keys."""
        sums = PIECE * self.row_pieces * (PIECE * self.channel_pieces + 1)
        return FLOAT_BYTES * self.threads * sums if self.warps_k > 1 else 0

    def to_json(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        return fields_to_json(self)

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> TileConfig:
        """Return the config that `to_json` wrote."""
        return cls(**fields_from_json(fields))


# row_pieces, key_pieces, warps_q, warps_k, in the order in which they are tried.
_SHORTEST = ((1, 1, 2, 2),)
_SHORT = ((1, 1, 2, 4),)
_LONG = ((2, 1, 2, 4), (2, 1, 2, 2))
_WIDE = ((1, 1, 2, 4), (1, 1, 2, 2), (1, 1, 4, 1), (1, 1, 2, 1), (1, 1, 1, 1))


def choose(n: int, num_features: int, head_dim: int, shared_bytes: int = AMPERE_SHARED_BYTES) -> TileConfig:
    """Return the default config for up to `n` positions, on GPUs whose blocks may have `shared_bytes` of shared memory.

    A block never takes more than sm_80 has, so that a library for later GPUs serves that, too.

    Raises
    ------
    ValueError
        If no tile fits into registers and shared memory.
    """
    limit = min(shared_bytes, AMPERE_SHARED_BYTES)
    length = gpu_bucket(n)
    first = _SHORTEST if length < 256 else _SHORT if length <= 512 else _LONG
    for tile in (*first, *_WIDE):
        config = _tiles(num_features, head_dim, length, tile)
        if config is not None and config.shared_bytes <= limit:
            return config
    raise ValueError(
        f"No tile of {head_dim} channels and {num_features} features fits into registers and {limit} bytes of shared "
        "memory; use the fft algorithm."
    )


def _tiles(num_features: int, head_dim: int, length: int, tile: tuple[int, int, int, int]) -> TileConfig | None:
    try:
        return TileConfig(num_features, head_dim, length, *tile)
    except ValueError:
        return None
