"""Gradients of the `direct` algorithm on tensor cores: their config, and the shapes of the buffers between functions.

Two kernels make them: one keeps queries and walks over the keys, the other keeps keys and walks over the queries.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from rpe_tvm.plan.buckets import bucket_length
from rpe_tvm.plan.config import fields_from_json, fields_to_json
from rpe_tvm.plan.gpu_direct import MAX_SHARED_BYTES, ROWS, WARP, Dtype, TensorCoreConfig, round_up, row_bytes

BLOCKS = 264  # of keys that run at once on an H100, two on a multiprocessor


@dataclass(frozen=True)
class TensorCoreBackwardConfig:
    """What one compiled operator computes, and in which tiles.

    Parameters
    ----------
    num_features, head_dim, length, dtype
        As of `TensorCoreConfig`.
    row_blocks : int
        Blocks of 16 rows, queries or keys, that a warp keeps.
    warps : int
        Warps of a block side by side along the rows that it keeps.
    shares : int
        Warps that keep the same rows: each takes its share of every tile, and they add up what they have at the end.
    tile : int
        Rows that a block loads at once and walks over.
    stages : int
        Tiles in shared memory: one in use, the others on their way.
    blocks : int
        Blocks that one multiprocessor shall hold at once: bounds the registers of a thread; 0 leaves that to nvcc.
    """

    num_features: int
    head_dim: int
    length: int
    dtype: Dtype
    row_blocks: int = 2
    warps: int = 4
    shares: int = 1
    tile: int = 64
    stages: int = 2
    blocks: int = 2

    op: ClassVar[str] = "backward"

    def __post_init__(self) -> None:
        for field in ("num_features", "head_dim", "length", "row_blocks", "warps", "shares", "tile"):
            if getattr(self, field) < 1:
                raise ValueError(f"Invalid {field}: expected a positive number, got {getattr(self, field)}.")
        if self.dtype not in ("bfloat16", "float16"):
            raise ValueError(f"Invalid dtype: expected 'bfloat16' or 'float16', got {self.dtype!r}.")
        if self.head_dim % 8:
            raise ValueError(f"Invalid head_dim: expected a multiple of 8, got {self.head_dim}.")
        if self.blocks < 0:
            raise ValueError(f"Invalid blocks: expected 0 or more, got {self.blocks}.")
        if self.stages < 2:
            raise ValueError(f"Invalid stages: expected at least 2, got {self.stages}.")
        if self.tile % (ROWS * self.shares):
            raise ValueError(
                f"Invalid tile: expected a multiple of {ROWS * self.shares} for {self.shares} shares, got {self.tile}."
            )
        if self.positions % 64:  # buffers in a workspace then begin where they may
            raise ValueError(f"Invalid tile: expected {self.rows} rows or it to be a multiple of 64, got {self.tile}.")
        if self.positions % self.rows or self.positions % self.tile:
            raise ValueError(f"Invalid tile: expected a multiple or a divisor of {self.rows} rows, got {self.tile}.")
        if self.threads > 1024:
            raise ValueError(f"Invalid warps: expected at most 32 in a block, got {self.warps * self.shares}.")
        if self.shared_bytes > MAX_SHARED_BYTES:
            raise ValueError(
                f"Too much shared memory: expected at most {MAX_SHARED_BYTES} bytes, got {self.shared_bytes}; "
                f"take fewer stages or a smaller tile."
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
    def of_features(self) -> TensorCoreConfig:
        """A config of the function that makes the features: it has no tiles."""
        return TensorCoreConfig(
            *(self.num_features, self.head_dim, self.length, self.dtype), tile_k=ROWS, stages=2, matrix_sums=True
        )

    @property
    def rows(self) -> int:
        """Queries or keys that a block keeps."""
        return ROWS * self.row_blocks * self.warps

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return WARP * self.warps * self.shares

    @property
    def positions(self) -> int:
        """What numbers of queries and keys are rounded up to in buffers."""
        return max(self.rows, self.tile)

    @property
    def share(self) -> int:
        """Rows of a tile that one warp takes."""
        return self.tile // self.shares

    @property
    def padded_features(self) -> int:
        """Features of a row of phi, zero from `num_features` on."""
        return round_up(self.num_features, ROWS)

    @property
    def padded_channels(self) -> int:
        """Channels of a row of value or grad_out in shared memory, zero from `head_dim` on."""
        return round_up(self.head_dim, ROWS)

    @property
    def feature_row_bytes(self) -> int:
        """Distance of two rows of phi in shared memory."""
        return row_bytes(self.padded_features)

    @property
    def channel_row_bytes(self) -> int:
        """Distance of two rows of value or grad_out in shared memory."""
        return row_bytes(self.padded_channels)

    @property
    def stage_places(self) -> tuple[int, int, int, int]:
        """Where in a stage channels, the weights of all its offsets and the rows' two terms begin, and where it ends.

        Features begin it. Only the kernel that keeps keys has the terms.
        """
        channels = self.tile * self.feature_row_bytes
        weights = channels + self.tile * self.channel_row_bytes
        terms = weights + 4 * (self.rows + self.tile)
        return channels, weights, terms, terms + 8 * self.tile

    @property
    def stage_bytes(self) -> int:
        """Shared memory of one tile."""
        return self.stage_places[-1]

    @property
    def diagonals(self) -> int:
        """Steps of 8 offsets between the rows that a warp keeps and those of its share."""
        return 2 * self.row_blocks - 1 + self.share // 8

    @property
    def diagonal_stride(self) -> int:
        """Distance of two columns of a warp's sums along diagonals in shared memory, 8 zeros on both sides.

        It is 4 more than a multiple of 16: then the lanes of a warp write to different banks.
        """
        return round_up(8 * self.diagonals + 16 - 4, ROWS) + 4

    @property
    def diagonal_bytes(self) -> int:
        """Shared memory of the sums along diagonals of all warps, of one tile."""
        return 4 * 8 * self.diagonal_stride * self.warps * self.shares

    @property
    def partial_bytes(self) -> int:
        """Shared memory of the sums of all warps that share rows but the first, where the tiles were before."""
        of_keys = self.padded_features // 2 + self.head_dim // 2
        registers = self.row_blocks * max(of_keys, self.padded_features)
        return 4 * WARP * self.warps * (self.shares - 1) * registers

    @property
    def query_shared_bytes(self) -> int:
        """Dynamic shared memory of a block that keeps queries."""
        return max(self.stages * self.stage_bytes, self.partial_bytes)

    @property
    def shared_bytes(self) -> int:
        """Dynamic shared memory of a block that keeps keys: two tiles' sums along diagonals besides."""
        return self.query_shared_bytes + 2 * self.diagonal_bytes

    def to_json(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        return fields_to_json(self)

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> TensorCoreBackwardConfig:
        """Return the config that `to_json` wrote."""
        return cls(**fields_from_json(fields))


def diagonals_shape(
    config: TensorCoreBackwardConfig, batch: int, heads: int, n_query: int, n_key: int
) -> tuple[int, int, int, int]:
    """Return the shape of the sums along diagonals of each slot, a block of threads, laid out as the weights are.

    Slots take the blocks of keys of their head in turns: no more of them are started than run at once.
    """
    blocks = -(-n_key // config.rows)
    turns = -(-batch * heads * blocks // BLOCKS)
    width = round_up(n_query, config.positions) + round_up(n_key, config.positions)
    return batch, heads, -(-blocks // turns), width


def choose(n: int, num_features: int, head_dim: int, dtype: Dtype) -> TensorCoreBackwardConfig:
    """Return the default config for up to `n` positions.

    Raises
    ------
    ValueError
        If the sums of 16 keys do not fit into a thread's registers.
    """
    kept = round_up(num_features, ROWS) * 3 // 4 + head_dim  # registers of a lane for 16 keys: sums and operands
    if kept > 180:
        raise ValueError(
            f"Too large for registers: expected 3 / 4 num_features + head_dim <= 180, got head_dim {head_dim} and "
            f"num_features {num_features}; gradients by FFT serve float32."
        )
    # few rows: smaller blocks, so that there is work for all multiprocessors
    row_blocks, stages = (1, 2) if n <= 2048 or 2 * kept > 180 else (2, 3)
    return TensorCoreBackwardConfig(num_features, head_dim, bucket_length(n), dtype, row_blocks, 4, 1, 64, stages)
