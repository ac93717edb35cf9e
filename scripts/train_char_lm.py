"""Train small byte-level language models that differ in their attention only; see docs/training.md.

The text is `pydoc_data.topics`, about 700 kB that every CPython brings along. `--quick` ends with exit code 1 unless
NPRF features with a relative bias end with a lower validation loss than NPRF features without.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import math
import sys
from dataclasses import dataclass
from typing import Any

import torch
import training
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, scaled_dot_product_attention

from rpe_tvm.torch import gaussian_projection, kernelized_attention, make_feature_map
from rpe_tvm.torch.toeplitz import toeplitz_matmul

BITS = "bits per byte"


@dataclass(frozen=True)
class Contestant:
    """One kind of attention: softmax or a feature map, and what it knows of relative positions."""

    attention: str
    has_bias: bool = False  # b, added to the logarithm of the weights (Luo 2021, Eqs. 6 and 10)
    has_fastrpb: bool = False  # W V, added to the output (FastRPB)


CONTESTANTS = {
    "softmax": Contestant("softmax"),
    "softmax+bias": Contestant("softmax", has_bias=True),
    "softmax+fastrpb": Contestant("softmax", has_fastrpb=True),
    "prf": Contestant("prf"),
    "nprf": Contestant("nprf"),
    "nprf+rpe": Contestant("nprf", has_bias=True),
    "nprf+fastrpb": Contestant("nprf", has_fastrpb=True),
}


@dataclass(frozen=True)
class Sizes:
    """Sizes of the model and of a batch."""

    length: int
    batch: int
    layers: int
    width: int
    heads: int
    features: int


FULL = Sizes(length=512, batch=8, layers=3, width=128, heads=4, features=32)
QUICK = Sizes(length=256, batch=8, layers=2, width=96, heads=4, features=32)


class Attention(nn.Module):
    """Causal attention of one contestant, ``[B, n, E] -> [B, n, E]``."""

    def __init__(self, contestant: Contestant, sizes: Sizes, seed: int) -> None:
        super().__init__()
        self.contestant = contestant
        self.heads = sizes.heads
        self.project = nn.Linear(sizes.width, 3 * sizes.width)
        self.out = nn.Linear(sizes.width, sizes.width)
        # All start at zero, so that contestants of one seed start as the same function.
        if contestant.has_bias:
            self.relative_bias = nn.Parameter(torch.zeros(sizes.heads, 2 * sizes.length - 1))
        if contestant.has_fastrpb:
            self.relative_weights = nn.Parameter(torch.zeros(sizes.heads, 2 * sizes.length - 1))
        self.register_buffer("projection", gaussian_projection(sizes.features, sizes.width // sizes.heads, seed=seed))

    def forward(self, x: Tensor) -> Tensor:
        batch, n, width = x.shape
        query, key, value = self.project(x).view(batch, n, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        bias = self.relative_bias if self.contestant.has_bias else x.new_zeros(self.heads, 2 * n - 1)
        if self.contestant.attention == "softmax":
            heads = _softmax_attention(query, key, value, bias if self.contestant.has_bias else None)
        else:
            feature_map = make_feature_map(self.contestant.attention, self.projection)
            heads = kernelized_attention(query, key, value, bias, feature_map=feature_map, is_causal=True)
        if self.contestant.has_fastrpb:
            past = torch.arange(2 * n - 1, device=x.device) < n  # offsets j - i <= 0
            heads = heads + toeplitz_matmul(self.relative_weights * past, value)
        return self.out(heads.transpose(1, 2).reshape(batch, n, width))


def _softmax_attention(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> Tensor:
    if bias is None:
        return scaled_dot_product_attention(query, key, value, is_causal=True)
    n = query.shape[2]
    position = torch.arange(n, device=query.device)
    offset = position - position[:, None]
    mask = bias[:, offset + n - 1].masked_fill(offset > 0, -math.inf)
    return scaled_dot_product_attention(query, key, value, attn_mask=mask)


class Block(nn.Module):
    """Attention and a feed-forward network, each behind a LayerNorm and beside a residual."""

    def __init__(self, contestant: Contestant, sizes: Sizes, seed: int) -> None:
        super().__init__()
        self.attention = Attention(contestant, sizes, seed)
        self.norms = nn.ModuleList(nn.LayerNorm(sizes.width) for _ in range(2))
        self.feed_forward = nn.Sequential(
            nn.Linear(sizes.width, 4 * sizes.width), nn.GELU(), nn.Linear(4 * sizes.width, sizes.width)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norms[0](x))
        return x + self.feed_forward(self.norms[1](x))


class LanguageModel(nn.Module):
    """Bytes ``[B, n]`` to logits of the next byte ``[B, n, 256]``.

    Every contestant has learned absolute positions: attention without relative ones would otherwise not know any.
    """

    def __init__(self, contestant: Contestant, sizes: Sizes, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.tokens = nn.Embedding(256, sizes.width)
        self.positions = nn.Parameter(0.02 * torch.randn(sizes.length, sizes.width))
        nn.init.normal_(self.tokens.weight, std=0.02)
        self.blocks = nn.Sequential(
            *(Block(contestant, sizes, seed * sizes.layers + layer) for layer in range(sizes.layers)),
            nn.LayerNorm(sizes.width),
        )
        self.head = nn.Linear(sizes.width, 256, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.tokens(x) + self.positions[: x.shape[1]]))


@functools.cache
def text() -> tuple[Tensor, Tensor]:
    """The first nine tenths of the document for training, the last tenth for validation, as bytes."""
    from pydoc_data.topics import topics

    document = "\n\n".join(topics[name] for name in sorted(topics)).encode()
    tokens = torch.frombuffer(bytearray(document), dtype=torch.uint8).long()
    split = len(tokens) * 9 // 10
    return tokens[:split], tokens[split:]


def run(name: str, seed: int, sizes: Sizes, schedule: training.Schedule, args: argparse.Namespace) -> dict[str, Any]:
    """Train one contestant from one seed."""
    train_text, validation_text = text()
    model = LanguageModel(CONTESTANTS[name], sizes, seed).to(args.device)
    count = min(64, (len(validation_text) - 1) // sizes.length)
    windows = validation_text[: count * sizes.length + 1]
    held_out = [part.view(count, -1).to(args.device) for part in (windows[:-1], windows[1:])]

    def loss(model: nn.Module, step: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        starts = torch.randint(len(train_text) - sizes.length, (sizes.batch, 1), generator=generator)
        batch = train_text[starts + torch.arange(sizes.length + 1)].to(args.device)
        return cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())

    def evaluate(model: nn.Module) -> dict[str, float]:
        losses = [
            cross_entropy(model(x).flatten(0, 1), y.flatten()).item()
            for x, y in zip(*(part.split(sizes.batch) for part in held_out), strict=True)
        ]
        return {BITS: sum(losses) / len(losses) / math.log(2)}

    settings = training.settings_of(schedule, args.device, **vars(sizes), contestant=name, seed=seed)
    curve = training.train(name, model, loss, evaluate, schedule, args.out / f"{name}-seed{seed}.pt", settings)
    return {"contestant": name, "seed": seed, **curve}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    training.add_arguments(parser, list(CONTESTANTS), "training_results/char_lm")
    args = training.parse(parser)
    sizes, steps = (QUICK, 350) if args.quick else (FULL, 600)
    quick = ["nprf", "nprf+rpe"]
    names = training.chosen(parser, args.contestants, list(CONTESTANTS), quick if args.quick else list(CONTESTANTS))
    schedule = training.Schedule(args.steps or steps)
    settings = training.settings_of(schedule, args.device, **vars(sizes))
    curves: list[dict[str, Any]] = []
    for name, seed in itertools.product(names, range(args.seeds)):
        curves.append(run(name, seed, sizes, schedule, args))
        training.store(curves, settings, args.out)
    training.report(curves, BITS, args.out, "Language model of Python's documentation, by its bytes")
    if not args.quick:
        return 0
    with_rpe, without = (training.final(curves, name, BITS) for name in ("nprf+rpe", "nprf"))
    is_better = with_rpe < without  # False where a run diverged or is missing
    print(
        f"{'ok' if is_better else 'error'}: nprf+rpe {with_rpe:.3f}, nprf {without:.3f} {BITS}; expected less with RPE"
    )
    return 0 if is_better else 1


if __name__ == "__main__":
    sys.exit(main())
