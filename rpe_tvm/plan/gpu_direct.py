"""The `direct` algorithm on tensor cores: its config, and the shapes of the buffers between its functions."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

from rpe_tvm.plan.buckets import bucket_length
from rpe_tvm.plan.config import fields_from_json, fields_to_json

Dtype = Literal["bfloat16", "float16"]

ROWS = 16  # rows of one matrix instruction, m16n8k16; also the features and keys that it sums over
WARP = 32
MAX_SHARED_BYTES = 227 * 1024  # what one block may use on sm_90; 163 KiB on sm_80
CHUNK_BYTES = 16  # what a thread copies to shared memory at once
FUSED_LENGTH = 1024  # keys that the fused kernel takes at most
FUSED_BLOCKS = 132  # multiprocessors of an H100, which holds one such block each
CLUSTER_BLOCKS = 128  # of them in clusters of two: so many found a place at once on an H100
CLUSTER_ARCH = 90  # the first architecture that has clusters


def round_up(size: int, multiple: int) -> int:
    """Return the smallest multiple that is not less than `size`."""
    return -(-size // multiple) * multiple


@dataclass(frozen=True)
class TensorCoreConfig:
    """What one compiled operator of `direct` on tensor cores computes, and in which tiles.

    Parameters
    ----------
    num_features : int
        Features m of the feature map.
    head_dim : int
        Channels d of a head, a multiple of 8: a row is copied in pieces of 16 bytes.
    length : int
        Bucket length: the tiles were chosen for lengths up to it; the functions themselves take any length.
    dtype : {"bfloat16", "float16"}
        Of query, key, value, out, and of the operands of the tensor cores. Sums are float32.
    row_blocks : int
        Blocks of 16 queries of one warp. More of them read a key and a value from shared memory less often.
    warps_q, warps_k : int
        Warps of a block side by side along the queries, and along the keys of a tile. Warps along the keys add up
        what they have at the end: they fill the GPU where there are few queries.
    tile_k : int
        Keys that a block loads at once.
    stages : int
        Tiles in shared memory: one in use, the others on their way.
    blocks : int
        Blocks that one multiprocessor shall hold at once: bounds the registers of a thread; 0 leaves that to nvcc,
        which may then spill a few.
    matrix_sums : bool
        Whether denominators are sums of rounded weights, by matrix instructions, or of exact ones, by additions. With
        float16 they must be: a row whose weights all underflow then becomes NaN, not 0.
    fused : bool
        Whether a block makes features and weights itself, for at most `length` keys: one launch instead of three, see
        `fused`.
    cluster : int
        Blocks of a fused kernel that share the features of all keys, each making an equal part; 1: each makes all.
    """

    num_features: int
    head_dim: int
    length: int
    dtype: Dtype
    row_blocks: int = 2
    warps_q: int = 4
    warps_k: int = 1
    tile_k: int = 64
    stages: int = 3
    blocks: int = 1
    matrix_sums: bool = False
    fused: bool = False
    cluster: int = 1

    op: ClassVar[str] = "attention"

    def __post_init__(self) -> None:
        for field in ("num_features", "head_dim", "length", "row_blocks", "warps_q", "warps_k", "tile_k"):
            if getattr(self, field) < 1:
                raise ValueError(f"Invalid {field}: expected a positive number, got {getattr(self, field)}.")
        if self.dtype not in ("bfloat16", "float16"):
            raise ValueError(f"Invalid dtype: expected 'bfloat16' or 'float16', got {self.dtype!r}.")
        if self.dtype == "float16" and not self.matrix_sums:
            raise ValueError("Invalid matrix_sums: expected True for float16, got False.")
        if self.head_dim % 8:
            raise ValueError(f"Invalid head_dim: expected a multiple of 8, got {self.head_dim}; pad value with zeros.")
        if self.blocks < 0:
            raise ValueError(f"Invalid blocks: expected 0 or more, got {self.blocks}.")
        if self.stages < 2:
            raise ValueError(f"Invalid stages: expected at least 2, got {self.stages}.")
        if self.fused:
            self._check_fused()
        elif self.cluster != 1:
            raise ValueError(f"Invalid cluster: expected 1 where fused is False, got {self.cluster}.")
        if self.tile_k % (ROWS * self.warps_k):
            raise ValueError(
                f"Invalid tile_k: expected a multiple of {ROWS * self.warps_k} for {self.warps_k} warps along the "
                f"keys, got {self.tile_k}."
            )
        if self.threads > 1024:
            raise ValueError(f"Invalid warps: expected at most 32 in a block, got {self.warps_q * self.warps_k}.")
        if self.shared_bytes > MAX_SHARED_BYTES:
            raise ValueError(
                f"Too much shared memory: expected at most {MAX_SHARED_BYTES} bytes, got {self.shared_bytes}; "
                f"take fewer stages or a smaller tile_k."
            )

    def _check_fused(self) -> None:
        if self.head_dim % ROWS:
            raise ValueError(f"Invalid head_dim: expected a multiple of {ROWS} for fused, got {self.head_dim}.")
        if self.cluster > 1:
            self._check_clustered()
            return
        if self.stages < 3:
            raise ValueError(f"Invalid stages: expected at least 3 for fused, got {self.stages}.")
        warps = self.warps_q * self.warps_k
        if self.tile_k % (ROWS * warps):
            raise ValueError(
                f"Invalid tile_k: expected a multiple of {ROWS * warps} for {warps} warps that make features, got "
                f"{self.tile_k}."
            )

    def _check_clustered(self) -> None:
        if self.cluster not in (2, 4, 8):
            raise ValueError(f"Invalid cluster: expected 1, 2, 4 or 8 blocks, got {self.cluster}.")
        if self.padded_features > 32:
            raise ValueError(f"Invalid num_features: expected at most 32 for clusters, got {self.num_features}.")
        if self.partial_bytes > self.stages * self.stage_bytes:
            raise ValueError(
                f"Invalid stages: expected {-(-self.partial_bytes // self.stage_bytes)} or more of {self.tile_k} keys, "
                f"where the sums of {self.warps_k} warps lie last, got {self.stages}."
            )
        if self.keys_of_turn % self.tile_k:
            raise ValueError(
                f"Invalid tile_k: expected a divisor of {self.keys_of_turn}, the keys whose features {self.cluster} "
                f"blocks make at once, got {self.tile_k}."
            )

    @property
    def name(self) -> str:
        """Readable name of the compiled operator, one per bucket."""
        return f"attention-m{self.num_features}-d{self.head_dim}-n{self.length}-{self.dtype}"

    @property
    def description(self) -> str:
        """One short word for tables: the algorithm with its tile."""
        return f"direct {self.tile_q}x{self.tile_k}{' fused' if self.fused else ''}"

    @property
    def tile_q(self) -> int:
        """Queries of a block."""
        return ROWS * self.row_blocks * self.warps_q

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return WARP * self.warps_q * self.warps_k

    @property
    def padded_features(self) -> int:
        """Features of a row of phi, zero from `num_features` on."""
        return round_up(self.num_features, ROWS)

    @property
    def key_row_bytes(self) -> int:
        """Distance of two rows of phi_k in shared memory."""
        return row_bytes(self.padded_features)

    @property
    def value_row_bytes(self) -> int:
        """Distance of two rows of value in shared memory; matrices are read in pairs of 8 channels."""
        return row_bytes(round_up(self.head_dim, ROWS))

    @property
    def stage_bytes(self) -> int:
        """Shared memory of one tile: phi_k, value, and the weights of all offsets from its queries to its keys.

        Fused: key and value, in a cluster value alone.
        """
        if self.fused:
            return (2 if self.cluster == 1 else 1) * self.tile_k * self.value_row_bytes
        return self.tile_k * (self.key_row_bytes + self.value_row_bytes) + 4 * (self.tile_q + self.tile_k)

    @property
    def shared_bytes(self) -> int:
        """Dynamic shared memory of a block."""
        tiles = self.stages * self.stage_bytes
        if self.fused:
            tiles += sum(self.fused_bytes)
        if self.cluster > 1:
            tiles += sum(self.clustered_bytes)
        return max(tiles, self.partial_bytes)

    @property
    def fused_bytes(self) -> tuple[int, int, int, int]:
        """Shared memory behind the tiles: phi_k of two of them, queries, the projection, weights of all offsets.

        In a cluster phi_k of all keys. A row of the projection is W rounded, then what rounding lost.
        """
        keys = 2 * self.tile_k if self.cluster == 1 else self.key_turns * self.keys_of_turn
        phi_k = keys * self.key_row_bytes
        queries = self.tile_q * self.value_row_bytes
        projection = self.padded_features * self.projection_row_bytes
        weights = 4 * (self.tile_q + round_up(self.length, self.tile_k))
        return phi_k, queries, projection, weights

    @property
    def clustered_bytes(self) -> tuple[int, int]:
        """Shared memory behind that: the block's own part of the keys, and what counts features that arrive, 8 bytes a
        turn.
        """
        own = self.key_turns * self.keys_of_turn // self.cluster
        return own * self.value_row_bytes, round_up(8 * self.key_turns, CHUNK_BYTES)

    @property
    def keys_of_turn(self) -> int:
        """Keys whose features all warps of a cluster make at once."""
        return ROWS * self.warps_q * self.warps_k * self.cluster

    @property
    def key_turns(self) -> int:
        """How often they do so, at most."""
        return -(-self.length // self.keys_of_turn)

    @property
    def projection_row_bytes(self) -> int:
        """Distance of two rows of the projection in shared memory."""
        return row_bytes(2 * self.head_dim)

    @property
    def partial_bytes(self) -> int:
        """Shared memory of the sums of all warps along the keys but the first, where the tiles were before."""
        registers = self.row_blocks * (self.head_dim // 2 + 2)
        return 4 * WARP * self.warps_q * (self.warps_k - 1) * registers

    def to_json(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        return fields_to_json(self)

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> TensorCoreConfig:
        """Return the config that `to_json` wrote."""
        return cls(**fields_from_json(fields))


def row_bytes(elements: int) -> int:
    """Return the distance of two rows of 16-bit numbers in shared memory.

    It is an odd number of 16-byte pieces: then 8 rows, which a matrix load reads at once, lie in different banks.
    """
    return CHUNK_BYTES * (2 * elements // CHUNK_BYTES | 1)


def features_shape(config: TensorCoreConfig, batch: int, heads: int, n: int, tile: int) -> tuple[int, int, int, int]:
    """Return the shape of phi_q (`tile` = tile_q) or phi_k (tile_k): zero past position n and past feature m."""
    return batch, heads, round_up(n, tile), config.padded_features


def table_shape(config: TensorCoreConfig, heads: int, n_query: int, n_key: int) -> tuple[int, int]:
    """Return the shape of the weights, float32: c[t] at index t + round_up(n_query, tile_q), zero elsewhere."""
    return heads, round_up(n_query, config.tile_q) + round_up(n_key, config.tile_k)


def choose(n: int, num_features: int, head_dim: int, dtype: Dtype) -> TensorCoreConfig:
    """Return the default config for up to `n` positions.

    Raises
    ------
    ValueError
        If the sums of 16 queries do not fit into a thread's registers.
    """
    sums = head_dim // 2 + num_features // 4  # registers of a lane for 16 queries: sums and phi_q
    row_blocks = 2 if sums <= 75 else 1
    if row_blocks * sums > 160:
        raise ValueError(
            f"Too large for registers: expected head_dim / 2 + num_features / 4 <= 160, got head_dim {head_dim} and "
            f"num_features {num_features}; use the fft algorithm."
        )
    is_full = row_blocks * sums > 88  # of sums: what a tile needs besides has to be less
    # few queries: warps share the keys, so that there is work for all multiprocessors
    if n <= 1024:
        warps_q, warps_k, keys, stages = 2, 4, 32, 2
    elif n <= 2048:
        warps_q, warps_k, keys, stages = 4, 2, 32 if is_full else 64, 2
    else:
        warps_q, warps_k, keys, stages = 4, 1, 32 if is_full else 64, 3
    if num_features + head_dim > 256:  # what sm_80 has of shared memory
        keys = 16
    return TensorCoreConfig(
        *(num_features, head_dim, bucket_length(n), dtype, row_blocks, warps_q, warps_k, keys * warps_k, stages),
        matrix_sums=is_full or dtype == "float16",
    )


@functools.cache
def fused(config: TensorCoreConfig) -> TensorCoreConfig | None:
    """Return the config of the one kernel that does the work of a config's three on short sequences, if there is one.

    Its tiles were the fastest of seven in a race on an H100 at 1024 positions.
    """
    m, d = config.num_features, config.head_dim
    if config.fused or config.length > FUSED_LENGTH or m > 32 or d > 64 or d % ROWS:
        return None
    sums = config.dtype == "float16"
    return TensorCoreConfig(m, d, config.length, config.dtype, 1, 4, 2, 128, 3, matrix_sums=sums, fused=True)


@functools.lru_cache(maxsize=4096)
def is_fused(config: TensorCoreConfig, batch: int, heads: int, n_query: int) -> bool:
    """Return whether the fused kernel serves a call: its blocks make the features of all keys again, each for itself,
    which costs less than two more launches as long as all blocks run at once.
    """
    one = fused(config)
    return one is not None and batch * heads * -(-n_query // one.tile_q) <= FUSED_BLOCKS


@functools.cache
def clustered(config: TensorCoreConfig) -> TensorCoreConfig | None:
    """Return the config of the kernel that takes the place of `fused` where the GPU has clusters, if there is one.

    In a race on an H100 at 1024 positions clusters of two blocks all ran at once; of four and eight, which would have
    less to do, some found no place and came second: 16.7 us, and 26 and 27. At 512 `fused` was faster: 10.6 and 12.1.
    """
    one = fused(config)
    return None if one is None or config.length <= FUSED_LENGTH // 2 else replace(one, stages=2, cluster=2)


@functools.lru_cache(maxsize=4096)
def is_clustered(config: TensorCoreConfig, batch: int, heads: int, n_query: int) -> bool:
    """Return whether that kernel serves a call of those that `is_fused` takes: all its clusters run at once."""
    one = clustered(config)
    if one is None:
        return False
    blocks = round_up(-(-n_query // one.tile_q), one.cluster)
    return batch * heads * blocks <= CLUSTER_BLOCKS


def is_readable(address: int, strides: Sequence[int]) -> bool:
    """Return whether value or out can be used where it lies: rows of whole 16-byte pieces, columns contiguous.

    Parameters
    ----------
    address : int
        Of the first element.
    strides : sequence of int
        In elements; those of axes of length 1 do not matter and may be given as 0.
    """
    return address % CHUNK_BYTES == 0 and strides[-1] == 1 and not any(s % 8 for s in strides[:-1])
