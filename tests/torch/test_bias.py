from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rpe_tvm.errors import ShapeError
from rpe_tvm.torch import (
    ALiBiBias,
    DecayBias,
    KerpleLogBias,
    KerplePowerBias,
    LearnedBias,
    LearnedBias2d,
    T5Bias,
)

H, LONGEST = 3, 6
MAKERS = {
    "learned": lambda: LearnedBias(H, LONGEST),
    "t5": lambda: T5Bias(H, num_buckets=8, max_distance=20),
    "t5 causal": lambda: T5Bias(H, num_buckets=8, max_distance=20, is_causal=True),
    "alibi": lambda: ALiBiBias(H),
    "decay": lambda: DecayBias(H),
    "kerple log": lambda: KerpleLogBias(H),
    "kerple power": lambda: KerplePowerBias(H),
}
ALL = pytest.mark.parametrize("name", MAKERS)
SIZES = st.integers(0, 40)


def made(name, seed=0):
    torch.manual_seed(seed)
    bias = MAKERS[name]()
    with torch.no_grad():
        for parameter in bias.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return bias


def t5_bucket(t, num_buckets, max_distance, is_causal):
    """Raffel et al. 2020 in plain numbers, for a single offset."""
    first = 0
    if is_causal:
        distance = max(-t, 0)
    else:
        num_buckets //= 2
        first, distance = (num_buckets if t > 0 else 0), abs(t)
    exact = num_buckets // 2
    if distance < exact:
        return first + distance
    share = math.log(distance / exact) / math.log(max_distance / exact)
    return first + min(exact + int(share * (num_buckets - exact)), num_buckets - 1)


def by_definition(bias, h, t):
    """b of head h at offset t = j - i, in float64."""
    if isinstance(bias, LearnedBias):
        return bias.rpe_bias[h, min(max(t, 1 - LONGEST), LONGEST - 1) + LONGEST - 1].item()
    if isinstance(bias, T5Bias):
        bucket = t5_bucket(t, bias.num_buckets, bias.max_distance, bias.is_causal)
        return bias.relative_attention_bias.weight[bucket, h].item()
    if isinstance(bias, ALiBiBias):
        return -[2**-4, 2**-8, 2**-2][h] * abs(t)  # of 2 heads, then every other of 4
    if isinstance(bias, DecayBias):
        return -math.exp(bias.log_rate[h].item()) * abs(t)
    a = math.exp(bias.log_a[h].item())
    if isinstance(bias, KerpleLogBias):
        return -math.exp(bias.log_p[h].item()) * math.log(1 + a * abs(t))
    return -a * abs(t) ** (2 / (1 + math.exp(-bias.logit_p[h].item())))


@ALL
@settings(max_examples=25, deadline=None)
@given(n_q=SIZES, n_k=SIZES)
def test_every_offset_by_its_definition_also_past_the_trained_range(name, n_q, n_k):
    bias = made(name)
    got = bias(n_q, n_k)
    assert got.shape == (H, max(n_q + n_k - 1, 0)) and got.dtype == torch.float32
    want = [[by_definition(bias, h, t) for t in range(1 - n_q, max(n_k, 1 - n_q))] for h in range(H)]
    torch.testing.assert_close(
        got.double(), torch.tensor(want, dtype=torch.float64).reshape(got.shape), rtol=1e-5, atol=1e-6
    )
    if n_q == n_k:
        assert torch.equal(bias(n_q), got)


@ALL
def test_gradients(name):
    bias = made(name).double()
    n_q, n_k = 9, 11
    if not list(bias.parameters()):
        assert not bias(n_q, n_k).requires_grad
        return
    # Numerically, at offsets inside and outside the trained range, 0 among them.
    parameters = tuple(bias.parameters())
    names = [key for key, _ in bias.named_parameters()]

    def of(*values):
        out = torch.func.functional_call(bias, dict(zip(names, values, strict=True)), (n_q, n_k))
        return out.double()

    assert torch.autograd.gradcheck(of, parameters)


def test_what_training_starts_from():
    assert not LearnedBias(H, LONGEST)(20).any()
    assert not T5Bias(H)(20).any()
    assert not LearnedBias2d(H, 2, 3)(4, 4).any()
    torch.testing.assert_close(DecayBias(12).log_rate.detach().exp(), ALiBiBias(12).slopes)
    torch.manual_seed(0)
    many = 20_000
    log, power = KerpleLogBias(many), KerplePowerBias(many)
    a, p = (x.detach().exp() for x in (log.log_a, log.log_p))
    torch.manual_seed(0)
    assert torch.equal(KerpleLogBias(many).log_a, log.log_a)
    for values, high in ((a, 1), (p, 2), (power.log_a.detach().exp(), 1), (2 * power.logit_p.detach().sigmoid(), 2)):
        assert 0 < values.min() < 0.02 and 0.99 * high < values.max() <= high
        assert abs(values.mean() - high / 2) < 0.02 * high


@pytest.mark.parametrize(
    ("num_heads", "exponents"),
    [
        (1, [8]),
        (2, [4, 8]),
        (8, [1, 2, 3, 4, 5, 6, 7, 8]),
        (12, [1, 2, 3, 4, 5, 6, 7, 8, 0.5, 1.5, 2.5, 3.5]),
        (3, [4, 8, 2]),
    ],
)
def test_alibi_slopes(num_heads, exponents):
    want = torch.tensor([2.0**-e for e in exponents])
    torch.testing.assert_close(ALiBiBias(num_heads).slopes, want)


def test_t5_buckets_of_the_published_sizes():
    # 32 buckets up to 128: the first offset of each bucket, as the widths of transformers' buckets give them.
    bias = T5Bias(1)
    with torch.no_grad():
        bias.relative_attention_bias.weight[:, 0] = torch.arange(32.0)
    buckets = bias(201)[0].int().tolist()
    by_offset = dict(zip(range(-200, 201), buckets, strict=True))
    starts = [0, 1, 2, 3, 4, 5, 6, 7, 8, 12, 16, 23, 32, 46, 64, 91]
    for sign, first in ((-1, 0), (1, 16)):
        for bucket, (start, following) in enumerate(zip(starts, [*starts[1:], 201], strict=True)):
            for distance in range(max(start, 1), following):
                assert by_offset[sign * distance] == first + bucket, (sign, distance)
    assert by_offset[0] == 0
    causal = T5Bias(1, is_causal=True)
    with torch.no_grad():
        causal.relative_attention_bias.weight[:, 0] = torch.arange(32.0)
    values = causal(300)[0].int()
    assert not values[299:].any()  # keys after the query
    assert values[:300].flip(0)[:16].tolist() == list(range(16)) and values[0] == 31
    assert set(values.tolist()) == set(range(32))


@ALL
def test_state_dict_deepcopy_pickle_and_repr(name):
    bias = made(name)
    want = bias(9, 11)
    fresh = made(name, seed=1)
    fresh.load_state_dict(bias.state_dict())
    for twin in (fresh, copy.deepcopy(bias), pickle.loads(pickle.dumps(bias))):
        assert torch.equal(twin(9, 11), want)
        assert repr(twin) == repr(bias) and f"num_heads={H}" in repr(twin)
    with torch.device("meta"):
        empty = MAKERS[name]()
    empty.to_empty(device="cpu").load_state_dict(bias.state_dict())
    assert torch.equal(empty(9, 11), want)


def test_t5_has_the_key_of_transformers():
    state = T5Bias(12).state_dict()
    assert {key: tuple(x.shape) for key, x in state.items()} == {"relative_attention_bias.weight": (32, 12)}


@pytest.mark.parametrize("name", ["alibi", "decay", "kerple log", "kerple power"])
def test_far_offsets_in_a_half_precision_module(name):
    # bfloat16 has 8 bits and would make 999 and 1000 one.
    got = made(name).bfloat16()(1001)
    assert got.dtype == torch.float32 and (got[:, 1:1000] > got[:, :999]).all()


@ALL
def test_compile_with_changing_lengths(name):
    torch._dynamo.reset()
    bias = made(name)
    compiled = torch.compile(bias, fullgraph=True, backend="aot_eager")
    for sizes in ((4, 4), (7, 7), (9, 5)):
        assert torch.equal(compiled(*sizes), bias(*sizes))


@settings(max_examples=40, deadline=None)
@given(height=st.integers(0, 7), width=st.integers(0, 7))
def test_learned_2d(height, width):
    torch.manual_seed(0)
    bias = LearnedBias2d(H, 3, 4)
    with torch.no_grad():
        bias.rpe_bias.normal_()
    got = bias(height, width)
    assert got.shape == (H, max(2 * height - 1, 0), max(2 * width - 1, 0)) and got.dtype == torch.float32
    for r, dr in enumerate(range(1 - height, height)):
        for c, dc in enumerate(range(1 - width, width)):
            nearest = bias.rpe_bias[:, min(max(dr, -2), 2) + 2, min(max(dc, -3), 3) + 3]
            assert torch.equal(got[:, r, c], nearest)


def test_learned_2d_takes_swins_table():
    height, width = 2, 3
    table = torch.randn((2 * height - 1) * (2 * width - 1), H)
    bias = LearnedBias2d(H, height, width)
    with torch.no_grad():
        bias.rpe_bias.copy_(table.mT.unflatten(1, (2 * height - 1, 2 * width - 1)).flip(1, 2))
    got = bias(height, width)
    places = [(r, c) for r in range(height) for c in range(width)]
    for r, c in places:
        for r2, c2 in places:
            index = (r - r2 + height - 1) * (2 * width - 1) + c - c2 + width - 1  # Swin: query (r, c) minus key
            assert torch.equal(got[:, r2 - r + height - 1, c2 - c + width - 1], table[index])


def test_learned_2d_state_dict_deepcopy_pickle_and_repr():
    bias = LearnedBias2d(H, 3, 4)
    torch.nn.init.normal_(bias.rpe_bias)
    fresh = LearnedBias2d(H, 3, 4)
    fresh.load_state_dict(bias.state_dict())
    for twin in (fresh, copy.deepcopy(bias), pickle.loads(pickle.dumps(bias))):
        assert torch.equal(twin(5, 5), bias(5, 5))
    assert repr(bias) == "LearnedBias2d(num_heads=3, max_height=3, max_width=4)"
    bias(5, 5).sum().backward()
    # 9 x 9 offsets, of which each lies at the nearest of 5 x 7.
    rows, columns = torch.tensor([3.0, 1, 1, 1, 3]), torch.tensor([2.0, 1, 1, 1, 1, 1, 2])
    torch.testing.assert_close(bias.rpe_bias.grad, (rows[:, None] * columns).expand(H, -1, -1))


def test_errors():
    for make in (LearnedBias, T5Bias, ALiBiBias, DecayBias, KerpleLogBias, KerplePowerBias, LearnedBias2d):
        sizes = {LearnedBias: (4,), LearnedBias2d: (4, 4)}.get(make, ())
        with pytest.raises(ShapeError, match="Invalid num_heads: expected a positive integer, got 0"):
            make(0, *sizes)
    with pytest.raises(ShapeError, match="Invalid max_length"):
        LearnedBias(H, 0)
    with pytest.raises(ShapeError, match="Invalid max_width"):
        LearnedBias2d(H, 1, 0)
    with pytest.raises(ShapeError, match="num_buckets: expected at least 4 for is_causal=False, got 3"):
        T5Bias(H, num_buckets=3)
    with pytest.raises(ShapeError, match="max_distance: expected more than the 8 distances"):
        T5Bias(H, max_distance=8)
    for name in MAKERS:
        with pytest.raises(ShapeError, match="at least 0, got -1 and 4"):
            made(name)(-1, 4)
        with pytest.raises(ShapeError, match="at least 0, got 4 and -2"):
            made(name)(4, -2)
