"""Buckets hold every length and are close to each other."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rpe_tvm.plan.buckets import MIN_LENGTH, bucket_length, neighbours


@given(st.integers(0, 10**7))
def test_a_bucket_holds_its_lengths_and_is_the_smallest(n):
    length = bucket_length(n)
    assert length >= max(n, MIN_LENGTH)
    if length > MIN_LENGTH:
        assert bucket_length(length) == length
        assert length - 1 < n or bucket_length(length - 1) == length


def test_neighbours_are_at_most_1_35_apart_and_factor_into_small_primes():
    lengths = neighbours(1, 10**6)
    assert lengths[0] == MIN_LENGTH
    for shorter, longer in zip(lengths[:-1], lengths[1:], strict=True):
        assert 1 < longer / shorter <= 1.35
        for prime in (2, 3, 5):
            while longer % prime == 0:
                longer //= prime
        assert longer == 1


@pytest.mark.parametrize("power", [1024, 2048, 16384, 65536])
def test_one_position_more_than_a_power_of_two_takes_an_eighth_more(power):
    assert bucket_length(power) == power and bucket_length(power + 1) == 9 * power // 8


def test_a_negative_length_is_refused():
    with pytest.raises(ValueError, match="expected n >= 0, got -1"):
        bucket_length(-1)
