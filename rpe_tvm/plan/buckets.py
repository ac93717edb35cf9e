"""Bucket lengths: the transform lengths that operators are compiled for."""

MIN_LENGTH = 64
# From here on FFTs are the faster ones. Their time is the bucket's; that of tiles is the sequence's.
_FFT_LENGTH = 1024


def bucket_length(n: int) -> int:
    """Return the smallest bucket that holds `n` positions.

    Buckets are 4, 5 and 6 times powers of two, and above 1024 also 9 times. So neighbours are at most 4/3 apart, the
    one after a power of two is close to it, and every bucket factors into the radices 2, 3, 4, 5 and 8. A Toeplitz
    product of a bucket's length P is the sum of a circulant and a skew-circulant product of length P (see
    `docs/operators.md`), which together are one cyclic convolution of N = 2 P >= 2 n - 1 points.

    Parameters
    ----------
    n : int
        Number of positions, the larger of queries and keys; at least 0.

    Returns
    -------
    int
        The bucket's length, at least `MIN_LENGTH`.

    Raises
    ------
    ValueError
        If `n` is negative.
    """
    if n < 0:
        raise ValueError(f"Invalid length: expected n >= 0, got {n}.")
    power = MIN_LENGTH // 8
    while 12 * power < n:
        power *= 2
    multiples = (8, 9, 10, 12) if n > _FFT_LENGTH else (8, 10, 12)
    return next(multiple * power for multiple in multiples if multiple * power >= n)


def neighbours(lowest: int, highest: int) -> list[int]:
    """Return all buckets from the one of `lowest` to the one of `highest`."""
    lengths = [bucket_length(lowest)]
    while lengths[-1] < highest:
        lengths.append(bucket_length(lengths[-1] + 1))
    return lengths
