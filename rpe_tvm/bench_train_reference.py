"""What training steps have to give, in float64: output and gradients of all rows, one head at a time."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING

from rpe_tvm import bench_machine, reference
from rpe_tvm.bench_train_steps import Inputs, Size, differentiate, step_bytes
from rpe_tvm.errors import RpeTvmError

if TYPE_CHECKING:
    import torch

# Up to this length the dense definition is quick: n * n numbers for each head.
DENSE_LENGTH = 1024


class NoRoomError(RpeTvmError, MemoryError):
    """The reference does not fit into memory, so that nothing can be checked."""


def expected(inputs: Inputs, is_causal: bool) -> tuple[torch.Tensor, ...]:
    """Output and gradients of attention with NPRF features in float64, as `bench_train_steps.PARTS`.

    Up to `DENSE_LENGTH` by the dense definition, `rpe_tvm.reference.attention_gradients`. Beyond that its n * n numbers
    take too long, and the gradients by offset need all of them, so that a sample of rows would not do: there it is
    torch's autograd in float64 through torch.fft. The two agree to about 1e-13 (the tests compare them), a
    millionth of the float32 errors that are judged by them.

    Raises
    ------
    NoRoomError
        If there is not enough memory for one head.
    """
    if inputs.query.shape[2] <= DENSE_LENGTH:
        return _by_head(lambda head: _dense(head, is_causal), inputs)
    _check_room(inputs)
    return through_fft(inputs, is_causal)


def through_fft(inputs: Inputs, is_causal: bool, in_float64: bool = True) -> tuple[torch.Tensor, ...]:
    """The same by autograd through `peers.torch_fft_attention`, in float64 or in float32."""
    from rpe_tvm import peers

    def step(head: Inputs) -> tuple[torch.Tensor, ...]:
        q, k, v, b = head.learned
        attend = functools.partial(peers.torch_fft_attention, q, k, v, b, head.projection, is_causal=is_causal, chunk=1)
        return differentiate(attend, head)

    return _by_head(step, inputs, in_float64)


def expected_softmax(inputs: Inputs, is_causal: bool) -> tuple[torch.Tensor, ...]:
    """Output and gradients of softmax attention with the bias (Luo et al. 2021, Eq. 6) in float64, dense."""
    import torch

    n, head_dim = inputs.query.shape[2:]
    offset = torch.arange(n) - torch.arange(n)[:, None]

    def step(head: Inputs) -> tuple[torch.Tensor, ...]:
        def attend() -> torch.Tensor:
            scores = head.query @ head.key.mT / head_dim**0.5 + head.rpe_bias[:, offset + n - 1]
            if is_causal:
                scores = scores.masked_fill(offset > 0, -torch.inf)
            return torch.softmax(scores, dim=-1) @ head.value

        return differentiate(attend, head)

    return _by_head(step, inputs)


def _by_head(
    step: Callable[[Inputs], tuple[torch.Tensor, ...]], inputs: Inputs, in_float64: bool = True
) -> tuple[torch.Tensor, ...]:
    """The parts that `step` gives for each head, put together."""
    import torch

    def convert(x: torch.Tensor) -> torch.Tensor:
        return x.detach().double() if in_float64 else x.detach()

    found = []
    for h in range(inputs.query.shape[1]):
        one = slice(h, h + 1)
        found.append(
            step(
                Inputs(
                    query=convert(inputs.query[:, one]).requires_grad_(),
                    key=convert(inputs.key[:, one]).requires_grad_(),
                    value=convert(inputs.value[:, one]).requires_grad_(),
                    rpe_bias=convert(inputs.rpe_bias[one]).requires_grad_(),
                    projection=convert(inputs.projection),
                    grad_out=convert(inputs.grad_out[:, one]),
                )
            )
        )
    output, *gradients, of_bias = zip(*found, strict=True)
    return (*(torch.cat(heads, dim=1) for heads in (output, *gradients)), torch.cat(of_bias))


def _dense(head: Inputs, is_causal: bool) -> tuple[torch.Tensor, ...]:
    import torch

    q, k, v, b = (x.detach().numpy() for x in head.learned)
    projection, grad_out = head.projection.numpy(), head.grad_out.numpy()
    output = reference.attention(q, k, v, b, projection, "nprf", is_causal)[2]
    gradients = reference.attention_gradients(grad_out, q, k, v, b, projection, "nprf", is_causal)
    return tuple(torch.from_numpy(each) for each in (output, *gradients[:4]))


def _check_room(inputs: Inputs) -> None:
    n, head_dim = inputs.query.shape[2:]
    one_head = Size(n, 1, inputs.projection.shape[0], head_dim)
    shortage = bench_machine.shortage(2 * step_bytes("torch_fft_by_feature", one_head), bench_machine.free_bytes())
    if shortage is not None:
        raise NoRoomError(
            f"Cannot check the gradients at n={n}: expected room for the float64 reference of one head, which "
            f"{shortage}; leave n={n} out of --lengths (--memory-lengths may have it: memory needs no reference)"
        )
