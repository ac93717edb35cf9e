"""The operator ``torch.ops.rpe_tvm.draw_projection``: the next projection of a stream of random ones.

The stream's state is a tensor, so that a layer keeps it in its state dict and goes on where it stopped; an operator
of its own, so that torch.compile takes a draw as one step.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from rpe_tvm.torch.projection import draw_projection

torch.library.define(
    "rpe_tvm::draw_projection",
    "(Tensor(a!) state, str kind, int num_features, int head_dim) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def next_projection(state: Tensor, kind: str, num_features: int, head_dim: int) -> Tensor:
    """Draw a projection ``[m, d]``, and move ``state`` on.

    Parameters
    ----------
    state : Tensor
        State of a CPU generator, ``torch.Generator().get_state()``; changed in place.
    kind : str
        See `draw_projection`.
    num_features, head_dim : int
        m and d.

    Raises
    ------
    RuntimeError
        If a backward pass is running: activation checkpointing computes the forward pass again, and would get
        another projection than the first time, and so wrong gradients.
    """
    return cast(Tensor, torch.ops.rpe_tvm.draw_projection(state, kind, num_features, head_dim))


def _draw(state: Tensor, kind: str, num_features: int, head_dim: int) -> Tensor:
    # Private, but what torch.utils.checkpoint itself asks: -1 outside of a backward pass.
    if torch._C._current_graph_task_id() != -1:
        raise RuntimeError(
            "A layer with redraw=True cannot be computed again in the backward pass (activation checkpointing): its "
            "projection would be another one, and the gradients wrong. Leave the layer out of the checkpoint, or build "
            "it with redraw=False."
        )
    generator = torch.Generator()
    generator.set_state(state)
    projection = draw_projection(kind, num_features, head_dim, generator)
    state.copy_(generator.get_state())
    return projection


def _draw_fake(state: Tensor, kind: str, num_features: int, head_dim: int) -> Tensor:
    return state.new_empty([num_features, head_dim], dtype=torch.float32)


torch.library.impl("rpe_tvm::draw_projection", "CompositeExplicitAutograd", _draw)
torch.library.register_fake("rpe_tvm::draw_projection", _draw_fake)
