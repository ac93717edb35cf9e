from __future__ import annotations

import copy
import pickle

import pytest
import torch

from rpe_tvm.errors import DTypeError, ShapeError
from rpe_tvm.torch import (
    NPRF,
    PRF,
    RFA,
    T2R,
    TRF,
    KernelizedAttention,
    elu_features,
    gaussian_projection,
    kernelized_attention,
    orthogonal_projection,
    sphere_projection,
)

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


@pytest.mark.parametrize("redraw", [False, True])
@torch.no_grad()
def test_built_on_meta_and_filled_later(reference_operator, redraw):
    attention = layer(redraw=redraw)
    with torch.device("meta"):
        empty = KernelizedAttention(H, D, LONGEST, num_features=4, redraw=redraw).eval()
    assert empty.rpe_bias.is_meta
    empty.to_empty(device="cpu").load_state_dict(attention.state_dict())
    assert torch.equal(empty(*inputs(6, 6)), attention(*inputs(6, 6)))


def test_errors(reference_operator):
    attention = layer()
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
    with pytest.raises(ValueError, match="Unknown projection 'ball'"):
        layer(projection="ball")
    with pytest.raises(ValueError, match="Expected max_length or bias, got neither"):
        KernelizedAttention(H, D)
    with pytest.raises(ValueError, match="at most one of redraw and learned_projection"):
        layer(redraw=True, learned_projection=True)
    for option in ("redraw", "learned_projection"):
        with pytest.raises(ValueError, match="a feature map of your own"):
            layer(feature_map=elu_features, **{option: True})
    with pytest.raises(TypeError, match="Invalid feature_map: .*got 5"):
        layer(feature_map=5)(query, key, value)
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
    x = {0: torch.export.Dim("batch", min=1, max=8), 2: torch.export.Dim("n", min=2, max=2 * LONGEST)}
    program = torch.export.export(attention, inputs(6, 6), dynamic_shapes=(x, x, x))
    for n in (2, 6, 12, 20):
        assert torch.equal(program.module()(*inputs(n, n)), attention(*inputs(n, n)))


@torch.no_grad()
def test_longer_sequences_take_the_outermost_bias(reference_operator):
    attention = layer()
    offsets = torch.arange(-19, 25).clamp(-(LONGEST - 1), LONGEST - 1)
    rpe_bias = attention.rpe_bias[:, offsets + LONGEST - 1]
    args = inputs(20, 25)
    want = kernelized_attention(*args, rpe_bias, feature_map=NPRF(attention.projection))
    assert torch.equal(attention(*args), want)


class Slope(torch.nn.Module):
    """A bias with one parameter for each head, by the contract of bias modules."""

    def __init__(self):
        super().__init__()
        self.slopes = torch.nn.Parameter(torch.linspace(0.1, 0.5, H))

    def forward(self, n_q, n_k=None):
        offsets = torch.arange(-(n_q - 1), n_q if n_k is None else n_k)
        return -self.slopes[:, None] * offsets.abs()


def test_a_bias_module_in_place_of_the_parameter():
    attention = KernelizedAttention(H, D, bias=Slope(), num_features=4)
    assert [name for name, _ in attention.named_parameters()] == ["bias.slopes"]
    assert set(attention.state_dict()) == {"bias.slopes", "projection"}
    assert "Slope()" in repr(attention) and "max_length" not in repr(attention)
    args = inputs(7, 9)
    want = kernelized_attention(*args, attention.bias(7, 9), feature_map=NPRF(attention.projection))
    out = attention(*args)
    torch.testing.assert_close(out, want)
    out.square().sum().backward()
    assert attention.bias.slopes.grad.all()


def own_maps():
    torch.manual_seed(0)
    return [
        elu_features,
        T2R(H, D, 4),
        RFA(H, gaussian_projection(4, D, seed=0)),
        PRF(gaussian_projection(4, D, seed=0)),
    ]


@pytest.mark.parametrize("index", range(4))
def test_a_feature_map_of_ones_own(index):
    own = own_maps()[index]
    attention = layer(feature_map=own)
    args, lengths = inputs(7, 9), torch.tensor([9, 4])
    want = kernelized_attention(*args, attention._bias_of(7, 9), feature_map=own, key_lengths=lengths)
    for twin in (attention, copy.deepcopy(attention), pickle.loads(pickle.dumps(attention))):
        torch.testing.assert_close(twin(*args, lengths), want)
    assert "projection" not in attention.state_dict()
    if isinstance(own, torch.nn.Module):
        assert {f"feature_map.{name}" for name in own.state_dict()} < set(attention.state_dict())
        assert type(own).__name__ in repr(attention)
    elif own is elu_features:
        assert "feature_map='elu_features'" in repr(attention)


def test_training_moves_every_parameter():
    for own in own_maps()[1:3]:
        attention = layer(feature_map=own).train()
        torch.nn.init.uniform_(own.weight if isinstance(own, T2R) else own.scale, 0.5, 1.5)
        attention(*inputs(7, 7)).square().sum().backward()
        assert all(parameter.grad.any() for parameter in attention.parameters())


@pytest.mark.parametrize("kind", [PRF, NPRF, TRF])
def test_a_learned_projection(kind):
    attention = layer(feature_map=kind.name, learned_projection=True)
    assert {name for name, _ in attention.named_parameters()} == {"rpe_bias", "projection"}
    assert set(attention.state_dict()) == set(layer().state_dict())
    args = inputs(7, 7)
    out = attention(*args)
    torch.testing.assert_close(
        out, kernelized_attention(*args, attention._bias_of(7, 7), feature_map=kind(attention.projection))
    )
    out.square().sum().backward()
    assert attention.projection.grad.any()
    assert "learned_projection=True" in repr(attention)


@pytest.mark.parametrize(
    ("name", "draw"),
    [("gaussian", gaussian_projection), ("orthogonal", orthogonal_projection), ("sphere", sphere_projection)],
)
def test_the_kind_of_projection(name, draw):
    attention = layer(projection=name, seed=3)
    assert torch.equal(attention.projection, draw(4, D, seed=3))
    assert ("projection='sphere'" in repr(attention)) == (name == "sphere")


def seen_projections(attention, steps):
    """The projection of each of so many forward passes."""
    used = []
    original = attention._current_feature_map

    def spy():
        used.append(original().projection.clone())
        return NPRF(used[-1])

    attention._current_feature_map = spy
    for _ in range(steps):
        attention(*inputs(3, 3))
    del attention._current_feature_map
    return used


@pytest.mark.parametrize("kind", ["gaussian", "orthogonal", "sphere"])
def test_redraw_gives_every_training_step_its_projection(kind):
    attention = layer(redraw=True, projection=kind, seed=7).train()
    fixed = attention.projection.clone()
    first = seen_projections(attention, 3)
    assert len({tuple(w.flatten().tolist()) for w in (fixed, *first)}) == 4
    assert all(torch.equal(w, fixed) for w in seen_projections(attention.eval(), 2))

    # Reproducible by the seed, and independent of torch's default generator, which it leaves alone.
    twin = layer(redraw=True, projection=kind, seed=7).train()
    torch.manual_seed(99)
    state = torch.get_rng_state()
    again = seen_projections(twin, 3)
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))
    other = layer(redraw=True, projection=kind, seed=8).train()
    assert not torch.equal(seen_projections(other, 1)[0], first[0])

    # What goes on from a state dict, a copy or a pickle goes on identically.
    other.load_state_dict(attention.state_dict())
    heirs = [other, copy.deepcopy(attention), pickle.loads(pickle.dumps(attention))]
    following = seen_projections(attention.train(), 2)
    for heir in heirs:
        assert torch.equal(heir.projection, fixed)
        assert all(torch.equal(x, y) for x, y in zip(seen_projections(heir.train(), 2), following, strict=True))
    assert "redraw=True" in repr(attention)


def test_redraw_refuses_to_be_computed_again_in_a_backward_pass(reference_operator):
    attention = layer(redraw=True).train()
    query, key, value = (x.requires_grad_() for x in inputs(3, 3))
    for use_reentrant in (False, True):
        out = torch.utils.checkpoint.checkpoint(attention, query, key, value, use_reentrant=use_reentrant)
        with pytest.raises(RuntimeError, match="redraw=True cannot be computed again in the backward pass"):
            out.sum().backward()
    plain = layer().train()
    torch.utils.checkpoint.checkpoint(plain, query, key, value, use_reentrant=False).sum().backward()
    assert query.grad is not None


def test_redraw_compiles():
    torch._dynamo.reset()
    attention = layer(redraw=True).train()
    twin = copy.deepcopy(attention)
    compiled = torch.compile(twin, fullgraph=True, backend="aot_eager")
    outs = []
    for _ in range(3):
        outs.append(attention(*inputs(6, 6)))
        torch.testing.assert_close(compiled(*inputs(6, 6)), outs[-1])
    assert not torch.equal(outs[0], outs[1])
    assert torch.equal(twin.redraw_state, attention.redraw_state)
    result = torch.library.opcheck(torch.ops.rpe_tvm.draw_projection.default, (twin.redraw_state, "sphere", 4, D))
    assert set(result.values()) == {"SUCCESS"}


def test_grouped_heads_and_lengths(reference_operator):
    attention = layer()
    query, key, value = inputs(6, 6)
    lengths = torch.tensor([6, 2])
    narrow = key[:, :1], value[:, :1]
    wide = (x.expand(-1, H, -1, -1) for x in narrow)
    want = attention(query, *wide, lengths)
    torch.testing.assert_close(attention(query, *narrow, lengths), want)
    assert reference_operator.calls == []
    alone = attention(query[1:], *(x[1:, :, :2] for x in narrow))
    torch.testing.assert_close(want[1:], alone)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_layer_in_half_precision(dtype):
    attention = layer(feature_map=T2R(H, D, 4), learned_projection=False).to(dtype)
    args = [x.to(dtype) for x in inputs(6, 6)]
    out = attention(*args)
    assert out.dtype == dtype
    torch.testing.assert_close(out.float(), attention.float()(*(x.float() for x in args)), rtol=1e-2, atol=1e-2)
    nprf = layer().to(dtype)
    nprf(*args).sum().backward()
    assert nprf.rpe_bias.grad.dtype == dtype
