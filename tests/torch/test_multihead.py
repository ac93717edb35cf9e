from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from rpe_tvm.errors import DTypeError, ShapeError
from rpe_tvm.torch import MultiheadKernelizedAttention

pytestmark = pytest.mark.usefixtures("reference_operator")

E, H, LONGEST, M = 24, 4, 16, 8
D = E // H
CAUSAL = nn.Transformer.generate_square_subsequent_mask


def attention(**changes):
    torch.manual_seed(0)
    made = MultiheadKernelizedAttention(
        **{"embed_dim": E, "num_heads": H, "batch_first": True, "max_length": LONGEST, "num_features": M, **changes}
    )
    with torch.no_grad():
        for name, each in made.named_parameters():
            if "bias" in name:  # zeros at first, which would hide mistakes
                each.normal_()
    return made.eval()


def random(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def phi(x, w, name):
    """Luo 2021, Algorithm 1 and Eq. 5."""
    x = x / x.norm(dim=-1, keepdim=True) if name == "nprf" else x / x.shape[-1] ** 0.25
    return torch.exp(x @ w.mT - x.square().sum(-1, keepdim=True) / 2) / w.shape[0] ** 0.5


def exact(layer):
    return copy.deepcopy(layer).double()


def dense(layer, query, key, value, is_causal=False, key_weights=None):
    """The output of the layer from n x n scores; batch first. In float64 where its arguments are."""

    def heads(x, count):
        return x.unflatten(-1, (count, D)).transpose(1, 2).repeat_interleave(H // count, 1)

    n_q, n_k = query.shape[1], key.shape[1]
    q = heads(layer.q_proj(query), H)
    k, v = (heads(p(x), layer.num_kv_heads) for p, x in ((layer.k_proj, key), (layer.v_proj, value)))
    if isinstance(layer.feature_map, str):
        phi_q, phi_k = (phi(x, layer.projection, layer.feature_map) for x in (q, k))
    else:
        phi_q, phi_k = layer.feature_map(q, k)
    scores = phi_q @ phi_k.mT
    offset = torch.arange(n_k) - torch.arange(n_q)[:, None]
    if layer.rpe_bias is not None:
        scores = scores * layer.rpe_bias(n_q, n_k)[:, offset + n_q - 1].exp()
    if is_causal:
        scores = scores * (offset <= 0)
    if key_weights is not None:
        scores = scores * key_weights[:, None, None, :]
    total = scores.sum(-1, keepdim=True)
    weights = scores / torch.where(total == 0, 1.0, total)
    return layer.out_proj((weights @ v).transpose(1, 2).flatten(2))


def close(got, want, tolerance=2e-5):
    assert got.shape == want.shape
    assert (got.double() - want).norm() <= tolerance * want.norm()


@given(
    n_q=st.integers(1, LONGEST),
    n_k=st.integers(1, LONGEST),
    batch=st.integers(1, 3),
    name=st.sampled_from(["nprf", "prf"]),
    num_kv_heads=st.sampled_from([1, 2, 4]),
    is_causal=st.booleans(),
    has_bias=st.booleans(),
    batch_first=st.booleans(),
)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_output_and_gradients_are_those_of_the_dense_formula(
    n_q, n_k, batch, name, num_kv_heads, is_causal, has_bias, batch_first
):
    layer = attention(
        feature_map=name,
        num_kv_heads=num_kv_heads,
        is_causal=is_causal,
        max_length=LONGEST if has_bias else None,
        batch_first=batch_first,
        kdim=7,
        vdim=5,
    )
    inputs = [x.requires_grad_() for x in (random(batch, n_q, E), random(batch, n_k, 7), random(batch, n_k, 5))]
    out, weights = layer(*(x if batch_first else x.transpose(0, 1) for x in inputs))
    assert weights is None
    out = out if batch_first else out.transpose(0, 1)
    (out * random(*out.shape, seed=2)).sum().backward()

    twin = exact(layer)
    twins = [x.detach().double().requires_grad_() for x in inputs]
    want = dense(twin, *twins, is_causal)
    (want * random(*out.shape, seed=2)).sum().backward()
    close(out, want)
    got_grads, want_grads = ([x.grad for x in (*xs, *of.parameters())] for xs, of in ((inputs, layer), (twins, twin)))
    scale = torch.stack([g.norm() for g in want_grads]).norm()
    for got, expected in zip(got_grads, want_grads, strict=True):
        assert (got - expected).norm() <= 2e-5 * scale


@pytest.mark.parametrize("is_batched", [True, False])
@torch.no_grad()
def test_masked_keys(is_batched):
    layer, x = attention(), random(4, 9, E)
    masked = torch.zeros(4, 9, dtype=torch.bool)
    masked[0, 6:] = masked[1, :3] = masked[2, ::2] = masked[3, :] = True  # the end, the beginning, anywhere, all
    want = dense(exact(layer), x.double(), x.double(), x.double(), key_weights=(~masked).double())
    as_float = torch.zeros(4, 9).masked_fill(masked, -torch.inf)
    for mask in (masked, as_float):
        if is_batched:
            got = layer(x, x, x, key_padding_mask=mask)[0]
        else:
            got = torch.stack([layer(y, y, y, key_padding_mask=row)[0] for y, row in zip(x, mask, strict=True)])
        close(got, want)
        assert torch.equal(got[3], layer.out_proj.bias.expand(9, E))  # nothing is left to attend to
    weights = random(4, 9)
    want = dense(exact(layer), x.double(), x.double(), x.double(), key_weights=weights.double().exp())
    close(layer(x, x, x, key_padding_mask=weights)[0], want)


@torch.no_grad()
def test_all_ways_to_say_causal():
    x = random(2, 9, E)
    want = attention(is_causal=True)(x, x, x)[0]
    layer = attention()
    assert not torch.allclose(layer(x, x, x)[0], want)
    ways = (
        {"is_causal": True},
        {"attn_mask": CAUSAL(9)},
        {"attn_mask": CAUSAL(9) < 0},
        {"attn_mask": CAUSAL(9), "is_causal": True},
    )
    for way in ways:
        assert torch.equal(layer(x, x, x, **way)[0], want)
    assert torch.equal(attention(is_causal=True)(x, x, x, attn_mask=CAUSAL(9))[0], want)


class Softplus(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, query, key):
        return nn.functional.softplus(self.scale * query), nn.functional.softplus(self.scale * key)


class Distance(nn.Module):
    def forward(self, n_q, n_k):
        return -0.3 * torch.arange(-(n_q - 1), n_k).abs().expand(H, -1)


def test_feature_map_and_bias_of_ones_own():
    layer = attention(max_length=None, rpe_bias=Distance(), feature_map=Softplus())
    x = random(2, 63, E)
    out = layer(x, x, x)[0]
    close(out.detach(), dense(exact(layer), *[x.double()] * 3).detach())
    out.sum().backward()
    assert layer.feature_map.scale.grad.abs() > 0
    assert "feature_map.scale" in layer.state_dict() and "projection" not in layer.state_dict()


@torch.no_grad()
def test_strides_and_empty_tensors():
    layer = attention()
    wide = random(2, 18, 2 * E)
    x = wide[:, ::2, ::2]
    assert torch.equal(layer(x, x, x)[0], layer(*[x.contiguous()] * 3)[0])
    none = torch.zeros(2, 0, E)
    assert layer(none, none, none)[0].shape == (2, 0, E)
    assert layer(none, x, x)[0].shape == (2, 0, E)
    assert layer(x[:0], x[:0], x[:0])[0].shape == (0, 9, E)
    assert torch.equal(layer(x, none, none)[0], layer.out_proj.bias.expand(2, 9, E))


def encoder_layer(self_attn, **changes):
    torch.manual_seed(1)
    made = nn.TransformerEncoderLayer(E, H, dim_feedforward=32, **{"batch_first": True, "dropout": 0.0, **changes})
    made.self_attn = self_attn
    return made


def by_hand(encoder, src, **how):
    """`nn.TransformerEncoder` with norm_first=False."""
    for each in encoder.layers:
        src = each.norm1(src + each.self_attn(src, src, src, **how)[0])
        src = each.norm2(src + each.linear2(torch.relu(each.linear1(src))))
    return src


@pytest.mark.filterwarnings("ignore:Support for mismatched")  # of a bool and a float mask; both are taken
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("is_training", [True, False])
@pytest.mark.parametrize("has_grad", [True, False])
def test_in_a_transformer_encoder(batch_first, is_training, has_grad):
    layer = encoder_layer(attention(batch_first=batch_first), batch_first=batch_first)
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).train(is_training)
    src = random(3, 9, E)
    masked = torch.arange(9) >= torch.tensor([[9], [4], [1]])
    src = src if batch_first else src.transpose(0, 1)
    with torch.set_grad_enabled(has_grad):
        close(encoder(src), by_hand(encoder, src).double())
        close(encoder(src, src_key_padding_mask=masked), by_hand(encoder, src, key_padding_mask=masked).double())
        causal = by_hand(encoder, src, is_causal=True)
        assert not torch.allclose(causal, by_hand(encoder, src))
        for how in ({"mask": CAUSAL(9)}, {"mask": CAUSAL(9), "is_causal": True}, {"is_causal": True}):
            close(encoder(src, **how), causal.double())
        close(
            encoder(src, mask=CAUSAL(9), src_key_padding_mask=masked),
            by_hand(encoder, src, is_causal=True, key_padding_mask=masked).double(),
        )
        one = src[0] if batch_first else src[:, 0]
        close(encoder(one), by_hand(encoder, one).double())


def test_replaced_after_the_encoder_was_built():
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(E, H, 32, batch_first=True), 2).eval()
    for each in encoder.layers:
        each.self_attn = attention()
    src, masked = random(2, 9, E), torch.arange(9) >= torch.tensor([[9], [4]])
    with torch.no_grad():
        close(encoder(src), by_hand(encoder, src).double())
        with pytest.raises(RuntimeError, match="encoder.use_nested_tensor = False"):
            encoder(src, src_key_padding_mask=masked)
        encoder.use_nested_tensor = False
        close(encoder(src, src_key_padding_mask=masked), by_hand(encoder, src, key_padding_mask=masked).double())


def test_in_a_transformer_decoder():
    torch.manual_seed(1)
    decoder = nn.TransformerDecoderLayer(E, H, 32, dropout=0.0, batch_first=True)
    decoder.self_attn, decoder.multihead_attn = attention(is_causal=True), attention(seed=1)
    x, memory = random(2, 9, E), random(2, 5, E, seed=2)
    y = decoder.norm1(x + decoder.self_attn(x, x, x)[0])
    y = decoder.norm2(y + decoder.multihead_attn(y, memory, memory)[0])
    y = decoder.norm3(y + decoder.linear2(torch.relu(decoder.linear1(y))))
    close(decoder(x, memory), y.double())


def test_dropout_in_training_only():
    layer, x = attention(dropout=0.5), random(2, 9, E)
    assert torch.equal(layer(x, x, x)[0], attention()(x, x, x)[0])
    layer.train()
    assert not torch.equal(layer(x, x, x)[0], layer(x, x, x)[0])


@torch.no_grad()
def test_state_dict_deepcopy_pickle_and_repr():
    layer, x = attention(seed=5), random(2, 9, E)
    want = layer(x, x, x)[0]
    fresh = attention(seed=6)
    assert not torch.equal(fresh(x, x, x)[0], want)
    stored = io.BytesIO()
    torch.save(layer.state_dict(), stored)
    stored.seek(0)
    fresh.load_state_dict(torch.load(stored, weights_only=True))
    for twin in (fresh, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(twin(x, x, x)[0], want)
        assert twin.q_proj.weight.data_ptr() != layer.q_proj.weight.data_ptr()
    shown = repr(layer)
    assert "num_heads=4, num_kv_heads=4, batch_first=True, feature_map='nprf', num_features=8, is_causal=False" in shown
    assert "(out_proj): Linear(in_features=24, out_features=24, bias=True)" in shown
    assert "bias=False" in repr(attention(bias=False)) and attention(bias=False).out_proj.bias is None


def test_compile():
    torch._dynamo.reset()
    layer, x = attention(), random(2, 9, E)
    masked = torch.arange(9) >= torch.tensor([[9], [4]])
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for how in ({}, {"key_padding_mask": masked}, {"is_causal": True}, {"attn_mask": CAUSAL(9), "is_causal": True}):
        layer.zero_grad()
        want = layer(x, x, x, **how)[0]
        want.square().sum().backward()
        grads = [p.grad.clone() for p in layer.parameters()]
        layer.zero_grad()
        got = compiled(x, x, x, **how)[0]
        close(got.detach(), want.detach().double())
        got.square().sum().backward()
        for p, grad in zip(layer.parameters(), grads, strict=True):
            assert (p.grad - grad).norm() <= 1e-4 * grad.norm() + 1e-4


def test_half_precision():
    layer, x = attention(), random(2, 9, E)
    want = layer(x, x, x)[0].detach().double()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = layer(x, x, x)[0]
    assert out.dtype == torch.bfloat16
    close(out.detach(), want, tolerance=3e-2)
    out.float().square().sum().backward()
    assert all(p.grad.isfinite().all() and p.grad.any() for p in layer.parameters())
    for dtype in (torch.bfloat16, torch.float16):
        twin = copy.deepcopy(layer).to(dtype)
        out = twin(*[x.to(dtype)] * 3)[0]
        assert out.dtype == dtype
        close(out.detach(), want, tolerance=3e-2)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_errors():
    layer, x = attention(), random(2, 9, E)
    with pytest.raises(ValueError, match="need_weights=False"):
        layer(x, x, x, need_weights=True)
    window = (torch.arange(9) - torch.arange(9)[:, None]).abs() > 2
    for mask in (window, torch.zeros(9, 9), CAUSAL(9).T, random(9, 9)):
        for promised in (False, True):
            with pytest.raises(ValueError, match="expected the causal mask"):
                layer(x, x, x, attn_mask=mask, is_causal=promised)
    for mask in (CAUSAL(8), CAUSAL(9).expand(2 * H, 9, 9)):
        with pytest.raises(ShapeError, match=r"attn_mask: expected \[9, 9\]"):
            layer(x, x, x, attn_mask=mask)
    with pytest.raises(ShapeError, match=r"key_padding_mask: expected \[2, 9\], got \[9\]"):
        layer(x, x, x, key_padding_mask=torch.zeros(9, dtype=torch.bool))
    with pytest.raises(DTypeError, match="key_padding_mask: expected bool"):
        layer(x, x, x, key_padding_mask=torch.zeros(2, 9, dtype=torch.int64))
    with pytest.raises(ShapeError, match=r"query: expected \[B, n, 24\]"):
        layer(x[..., 1:], x, x)
    with pytest.raises(ShapeError, match=r"key: expected \[n, B, 24\]"):
        attention(batch_first=False)(x, x[0], x)
    with pytest.raises(ShapeError, match="as many values as keys"):
        layer(x, x, x[:, 1:])
    with pytest.raises(ShapeError, match="the batch of query"):
        layer(x, x[:1], x[:1])
    with pytest.raises(DTypeError, match="float64"):
        layer.double()(*[x.double()] * 3)
    for changes, message in (
        ({"num_heads": 5}, "a multiple of num_heads = 5, got 24"),
        ({"num_heads": 0}, "num_heads = 0"),
        ({"num_kv_heads": 3}, "a divisor of num_heads = 4, got 3"),
        ({"max_length": 0}, "max_length"),
        ({"num_features": 0}, "num_features"),
        ({"feature_map": "elu"}, "Unknown feature map 'elu'"),
        ({"rpe_bias": Distance()}, "at most one of max_length and rpe_bias"),
        ({"dropout": 1.5}, "dropout"),
    ):
        with pytest.raises(ValueError, match=message):
            attention(**changes)
    with pytest.raises(TypeError, match="feature_map: expected 'nprf', 'prf' or a callable"):
        attention(feature_map=3)
    nested = torch.nested.nested_tensor([row[: 4 + i] for i, row in enumerate(x)])
    with pytest.raises(ShapeError, match="nested tensor"):
        attention()(nested, nested, nested)
