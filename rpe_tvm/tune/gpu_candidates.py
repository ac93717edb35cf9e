"""Configs worth racing on a GPU for one dtype, length, number of features and head dimension."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from rpe_tvm.plan import gpu, gpu_choice, gpu_direct, rocm
from rpe_tvm.plan.buckets import bucket_length
from rpe_tvm.plan.gpu import GpuAttentionConfig
from rpe_tvm.plan.gpu_direct import Dtype, TensorCoreConfig
from rpe_tvm.plan.gpu_tiles import TileConfig
from rpe_tvm.plan.gpu_wisdom import GpuConfig
from rpe_tvm.plan.rocm_limits import is_rocm

# Points of a row -> (radices, blocks on a multiprocessor) worth racing: each radix divides the first one; few stages,
# or few registers.
ROWS: dict[int, tuple[tuple[tuple[int, ...], int], ...]] = {
    64: (((8, 8), 0), ((16, 4), 0)),
    128: (((16, 8), 0), ((8, 4, 4), 0)),
    256: (((16, 16), 0), ((8, 8, 4), 0)),
    512: (((8, 8, 8), 0), ((8, 8, 8), 12), ((16, 8, 4), 0), ((32, 16), 0)),
    1024: (((16, 8, 8), 0), ((16, 8, 8), 7), ((16, 16, 4), 0), ((32, 32), 0)),
    2048: (((16, 16, 8), 4), ((16, 16, 8), 5), ((8, 8, 8, 4), 0), ((32, 8, 8), 0)),
    4096: (((16, 16, 16), 2), ((16, 16, 16), 0), ((8, 8, 8, 8), 0), ((32, 16, 8), 0)),
    8192: (((16, 8, 8, 8), 0), ((16, 16, 8, 4), 0), ((32, 16, 16), 0)),
}
# Where a row alone does not do, or need not: shorter rows several times, without a bound. With folds a thread needs
# more registers than it would allow, with columns fewer.
FOLDS, FOLDED, LONGEST_FOLDED_ROW = (2, 4), (8192, gpu.FOLDED), 4096
COLUMNS, SHORTEST_COLUMNS = (4, 8, 16, 32), 16384
SHORTEST_ROW = 1024

# row_blocks, warps_q, warps_k, tile_k, stages, blocks, matrix_sums of `TensorCoreConfig`: the fastest of 37 in a race
# at 1024 to 16384 positions on an H100.
TILES: tuple[tuple[int, int, int, int, int, int, bool], ...] = (
    (2, 2, 2, 64, 3, 2, False),
    (2, 2, 2, 64, 3, 3, False),
    (2, 2, 4, 128, 3, 1, False),
    (2, 4, 1, 64, 2, 2, False),
    (2, 4, 1, 64, 3, 2, False),
    (2, 4, 1, 64, 3, 0, True),
    (2, 4, 1, 64, 3, 3, True),
    (2, 8, 1, 64, 3, 1, False),
    (4, 4, 1, 64, 3, 0, False),
)
# row_pieces, key_pieces, warps_q, warps_k, stages, blocks of `TileConfig`, and the longest that is worth trying.
FLOAT_TILES: tuple[tuple[int, int, int, int, int, int], ...] = (
    (1, 1, 2, 2, 2, 3),
    (1, 1, 2, 4, 2, 1),
    (1, 2, 4, 1, 2, 2),
    (1, 2, 4, 2, 2, 1),
    (2, 1, 1, 4, 2, 1),
    (2, 1, 2, 2, 2, 2),
    (2, 1, 2, 4, 2, 1),
    (2, 1, 4, 1, 3, 2),
    (2, 1, 4, 2, 2, 1),
    (2, 2, 2, 2, 2, 1),
)
LONGEST_FLOAT_TILES = 2 * gpu_choice.LONGEST_TILES
# On AMD GPUs: points of a row -> radices worth racing. Those of 16 points have half the threads.
AMD_ROWS: dict[int, tuple[tuple[int, ...], ...]] = {
    64: ((4, 4, 4), (8, 8)),
    128: ((4, 2, 4, 4), (8, 2, 8)),
    256: ((8, 4, 8), (4, 4, 4, 4), (16, 16)),
    512: ((8, 8, 8), (16, 4, 8)),
    1024: ((8, 4, 4, 8), (8, 2, 8, 8), (16, 8, 8)),
    2048: ((8, 4, 8, 8), (16, 8, 16)),
}
AMD_FOLDS = {2048: (2, 4), 4096: (4, 8)}
AMD_SHORTEST_COLUMNS = 4096

# From here on the FFT in float32, with conversions, takes part in the race of 16-bit numbers.
SHORTEST_CONVERTED = 16384


@dataclass(frozen=True)
class Size:
    """What one race is about.

    Parameters
    ----------
    dtype : {"float32", "bfloat16", "float16"}
        Of query, key, value and the output.
    n : int
        Positions, a bucket's length.
    num_features, head_dim : int
        Features m and channels d.
    """

    dtype: str
    n: int
    num_features: int
    head_dim: int

    @property
    def name(self) -> str:
        """Readable name, also of files."""
        return f"{self.dtype}-m{self.num_features}-d{self.head_dim}-n{self.n}"


def candidates(size: Size, target_id: str = gpu_choice.MEASURED) -> list[GpuConfig]:
    """Return the configs to race on a target, that of the rule first, no one twice.

    Raises
    ------
    ValueError
        If there is no kernel for these sizes.
    """
    dtype, n, num_features, head_dim = size.dtype, size.n, size.num_features, size.head_dim
    found = [gpu_choice.rule(n, num_features, head_dim, dtype, target_id)]
    if is_rocm(target_id):
        found += _on_amd(n, num_features, head_dim)
    elif dtype == "float32":
        found += _by_tiles(n, num_features, head_dim)
        found += _by_fft(n, num_features, head_dim)
    else:
        found += _on_tensor_cores(dtype, n, num_features, head_dim)  # type: ignore[arg-type]
        if n >= SHORTEST_CONVERTED:
            found.append(gpu.choose(n, num_features, head_dim))
    return list(dict.fromkeys(found))


def label(config: GpuConfig) -> str:
    """Return the name of a candidate among files: all of its config but what has no part in the kernels.

    Tensor cores take any length, so one library stands for the same tiles at all lengths.
    """
    sizes = f"m{config.num_features}-d{config.head_dim}"
    if isinstance(config, TensorCoreConfig):
        tiles = f"{config.row_blocks}x{config.warps_q}x{config.warps_k}-k{config.tile_k}-s{config.stages}"
        sums = "matrix" if config.matrix_sums else "exact"
        return f"direct-{config.dtype}-{sizes}-{tiles}-b{config.blocks}-{sums}"
    if isinstance(config, TileConfig):
        pieces = f"{config.row_pieces}x{config.key_pieces}"
        tiles = f"{pieces}-{config.warps_q}x{config.warps_k}-s{config.stages}-b{config.blocks}"
        return f"direct-{config.dtype}-{sizes}-n{config.length}-{tiles}"
    radices = ".".join(map(str, config.radices))
    split = f"c{config.columns}" if config.columns > 1 else f"f{config.folds}"
    return f"fft-{config.dtype}-{sizes}-n{config.length}-{split}-{radices}-t{config.threads}-b{config.blocks_per_sm}"


def _by_tiles(n: int, num_features: int, head_dim: int) -> Iterator[TileConfig]:
    length = gpu.gpu_bucket(n)
    for tile in FLOAT_TILES if length <= LONGEST_FLOAT_TILES else ():
        try:
            yield TileConfig(num_features, head_dim, length, *tile)
        except ValueError:  # a tile longer than the sequence, or too many features or channels
            continue


def _by_fft(n: int, num_features: int, head_dim: int) -> Iterator[GpuAttentionConfig]:
    length = gpu.gpu_bucket(n)
    for radices, blocks in ROWS.get(length, ()):
        yield _fft(num_features, head_dim, length, radices, blocks)
    if length in FOLDED:
        for folds in FOLDS:
            if length // folds <= LONGEST_FOLDED_ROW:
                for radices, _ in ROWS[length // folds]:
                    yield _fft(num_features, head_dim, length, radices, 0, folds=folds)
    if length >= SHORTEST_COLUMNS:
        for columns in COLUMNS:
            if SHORTEST_ROW <= length // columns <= gpu.LONGEST_ROW:
                yield _fft(num_features, head_dim, length, gpu.ROW_RADICES[length // columns], 0, columns=columns)


def _on_amd(n: int, num_features: int, head_dim: int) -> Iterator[GpuAttentionConfig]:
    length = gpu.gpu_bucket(n)
    for radices in AMD_ROWS.get(length, ()):
        yield rocm.config(num_features, head_dim, length, radices)
    for folds in AMD_FOLDS.get(length, ()):
        for radices in AMD_ROWS[length // folds]:
            yield rocm.config(num_features, head_dim, length, radices, folds)
    if length >= AMD_SHORTEST_COLUMNS:
        for columns in COLUMNS:
            for radices in AMD_ROWS.get(length // columns, ()) if length // columns >= SHORTEST_ROW else ():
                yield rocm.config(num_features, head_dim, length, radices, columns=columns)


def _fft(
    num_features: int,
    head_dim: int,
    length: int,
    radices: tuple[int, ...],
    blocks_per_sm: int,
    folds: int = 1,
    columns: int = 1,
) -> GpuAttentionConfig:
    threads = max(32, length // (folds * columns) // radices[0])
    return GpuAttentionConfig(num_features, head_dim, length, radices, threads, folds, columns, blocks_per_sm)


def _on_tensor_cores(dtype: Dtype, n: int, num_features: int, head_dim: int) -> Iterator[TensorCoreConfig]:
    # the rule's tiles of all lengths
    for length in (n, 1024, 2048, 4096):
        yield replace(gpu_direct.choose(length, num_features, head_dim, dtype), length=bucket_length(n))
    for row_blocks, warps_q, warps_k, tile_k, stages, blocks, matrix_sums in TILES:
        sums = matrix_sums or dtype == "float16"
        try:
            yield TensorCoreConfig(
                *(num_features, head_dim, bucket_length(n), dtype, row_blocks, warps_q, warps_k, tile_k, stages),
                blocks=blocks,
                matrix_sums=sums,
            )
        except ValueError:  # more shared memory than there is, with many features or channels
            continue
