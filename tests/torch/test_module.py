from __future__ import annotations

import copy
import pickle

import pytest
import torch

from rpe_tvm.errors import DTypeError, ShapeError
from rpe_tvm.torch import NPRF, PRF, KernelizedAttention, kernelized_attention

B, H, D, LONGEST = 2, 3, 8, 12


def layer(**changes):
    made = KernelizedAttention(**{"num_heads": H, "head_dim": D, "max_length": LONGEST, "num_features": 4, **changes})
    with torch.no_grad():
        made.rpe_bias.normal_(generator=torch.Generator().manual_seed(0))
    return made.eval()


def inputs(n_q, n_k):
    g = torch.Generator().manual_seed(n_q)
    return torch.randn(B, H, n_q, D, generator=g), *torch.randn(2, B, H, n_k, D, generator=g).unbind()


@pytest.mark.parametrize(("name", "kind"), [("nprf", NPRF), ("prf", PRF)])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize(("n_q", "n_k"), [(12, 12), (5, 5), (1, 12), (12, 1), (3, 7), (1, 1)])
@torch.no_grad()
def test_the_bias_of_the_lengths_at_hand(reference_operator, n_q, n_k, is_causal, name, kind):
    attention = layer(feature_map=name, is_causal=is_causal)
    # Offset j - i by offset, from the definition.
    offsets = range(-(n_q - 1), n_k)
    rpe_bias = torch.stack([attention.rpe_bias[:, offset + LONGEST - 1] for offset in offsets], 1)
    args = inputs(n_q, n_k)
    want = kernelized_attention(*args, rpe_bias, feature_map=kind(attention.projection), is_causal=is_causal)
    assert torch.equal(attention(*args), want)


@torch.no_grad()
def test_empty_sequences(reference_operator):
    assert layer()(*inputs(0, 0)).shape == (B, H, 0, D)
    assert layer()(*inputs(0, 4)).shape == (B, H, 0, D)
    assert not layer()(*inputs(4, 0)).any()


def test_parameters_and_defaults():
    attention = KernelizedAttention(num_heads=H, head_dim=64, max_length=100)
    assert attention.rpe_bias.shape == (H, 199) and not attention.rpe_bias.any()
    assert attention.rpe_bias.requires_grad
    assert attention.projection.shape == (32, 64) and not attention.projection.requires_grad
    assert [name for name, _ in attention.named_parameters()] == ["rpe_bias"]
    assert repr(attention) == (
        "KernelizedAttention(num_heads=3, head_dim=64, max_length=100, feature_map='nprf', num_features=32, "
        "is_causal=False)"
    )
    again, other = (KernelizedAttention(H, 64, 100, seed=seed) for seed in (0, 1))
    assert torch.equal(attention.projection, again.projection)
    assert not torch.equal(attention.projection, other.projection)


@torch.no_grad()
def test_state_dict_deepcopy_and_pickle(reference_operator):
    attention, args = layer(seed=5), inputs(6, 6)
    want = attention(*args)
    fresh = layer(seed=6)
    fresh.load_state_dict(attention.state_dict())
    for twin in (fresh, copy.deepcopy(attention), pickle.loads(pickle.dumps(attention))):
        assert torch.equal(twin(*args), want)
        assert twin.rpe_bias.data_ptr() != attention.rpe_bias.data_ptr()


@torch.no_grad()
def test_built_on_meta_and_filled_later(reference_operator):
    attention = layer()
    with torch.device("meta"):
        empty = KernelizedAttention(H, D, LONGEST, num_features=4)
    assert empty.rpe_bias.is_meta
    empty.to_empty(device="cpu").load_state_dict(attention.state_dict())
    assert torch.equal(empty(*inputs(6, 6)), attention(*inputs(6, 6)))


def test_errors(reference_operator):
    attention = layer()
    with pytest.raises(ShapeError, match="at most max_length = 12 positions, got 13 queries and 4 keys"):
        attention(*inputs(13, 4))
    with pytest.raises(ShapeError, match="got 4 queries and 13 keys"):
        attention(*inputs(4, 13))
    query, key, value = inputs(4, 4)
    with pytest.raises(ShapeError, match=r"query: expected \[B, 3, n, 8\], got \[2, 2, 4, 8\]"):
        attention(query[:, :2], key, value)
    with pytest.raises(ShapeError, match=r"key: expected \[B, 3, n, 8\], got \[2, 3, 4\]"):
        attention(query, key[..., 0], value)
    with pytest.raises(ShapeError, match="value"):
        attention(query, key, value[:, :, :2])
    with pytest.raises(DTypeError, match="query"):
        attention(query.double(), key, value)
    with pytest.raises(DTypeError, match="rpe_bias"):
        attention.half()(query, key, value)
    with pytest.raises(ValueError, match="Unknown feature map 'elu'"):
        layer(feature_map="elu")
    for name in ("num_heads", "head_dim", "max_length", "num_features"):
        with pytest.raises(ShapeError, match=f"Invalid {name}"):
            KernelizedAttention(**{"num_heads": H, "head_dim": D, "max_length": LONGEST, name: 0})


@pytest.mark.parametrize("grad", [False, True])
def test_compile_with_changing_lengths(reference_operator, grad):
    torch._dynamo.reset()
    attention = layer()
    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
    with torch.set_grad_enabled(grad):
        for n_q, n_k in ((6, 6), (7, 7), (9, 4), (12, 12)):
            assert torch.equal(compiled(*inputs(n_q, n_k)), attention(*inputs(n_q, n_k)))


def test_export_with_any_length(reference_operator):
    attention = layer()
    x = {0: torch.export.Dim("batch", min=1, max=8), 2: torch.export.Dim("n", min=2, max=LONGEST)}
    program = torch.export.export(attention, inputs(6, 6), dynamic_shapes=(x, x, x))
    for n in (2, 6, 12):
        assert torch.equal(program.module()(*inputs(n, n)), attention(*inputs(n, n)))
