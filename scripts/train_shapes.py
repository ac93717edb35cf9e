"""Train small vision models that differ in their relative positions only; see docs/training.md.

An image is covered with upright crosses, diagonal crosses and gaps, and some noise. For each pixel, the model says what
stands three rows below and six columns right of it: no cross (or the outside), a pixel of an upright cross, or one of a
diagonal cross. So it has to tell shapes apart, and to look elsewhere, in two dimensions. Images are generated, nothing
is downloaded. `--quick` ends with exit code 1 unless the two-dimensional bias ends above no relative positions.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from dataclasses import dataclass
from typing import Any

import torch
import training
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from rpe_tvm.torch import NPRF, gaussian_projection, grid_attention, kernelized_attention

RECALL = "mean recall"
CONTESTANTS = ("nprf", "nprf+rpe-1d", "nprf+rpe-2d")
# Nothing, an upright cross, a diagonal cross.
SHAPES = (
    ((0, 0, 0), (0, 0, 0), (0, 0, 0)),
    ((0, 1, 0), (1, 1, 1), (0, 1, 0)),
    ((1, 0, 1), (0, 1, 0), (1, 0, 1)),
)
BELOW, RIGHT = 3, 6


@dataclass(frozen=True)
class Sizes:
    """Sizes of the images, the model and a batch."""

    grid: int
    batch: int
    layers: int
    width: int
    heads: int
    features: int
    noise: float = 0.02


FULL = Sizes(grid=24, batch=16, layers=2, width=64, heads=4, features=32)
QUICK = Sizes(grid=16, batch=16, layers=2, width=64, heads=4, features=32)


def images(count: int, sizes: Sizes, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Pixels ``[count, grid, grid]``, 0 or 1, and for each pixel the answer, 0 to 2."""
    cells = -(-(sizes.grid + 2) // 3)  # room for a shift by two
    side = 3 * cells
    kinds = torch.randint(3, (count, cells, cells), generator=generator)
    kinds = kinds.repeat_interleave(3, 1).repeat_interleave(3, 2)
    shapes = torch.tensor(SHAPES).repeat(1, cells, cells)
    crosses = shapes[kinds, torch.arange(side)[:, None], torch.arange(side)]
    # Cut somewhere else for each image, so that no place is a cell's centre in all of them.
    shifts = torch.randint(3, (count, 2, 1), generator=generator) + torch.arange(sizes.grid)
    cut = torch.arange(count)[:, None, None], shifts[:, 0, :, None], shifts[:, 1, None, :]
    kinds, pixels = (kinds * crosses)[cut], crosses[cut]
    answers = torch.zeros_like(kinds)
    answers[:, :-BELOW, :-RIGHT] = kinds[:, BELOW:, RIGHT:]
    noise = torch.rand(pixels.shape, generator=generator) < sizes.noise
    return pixels ^ noise.long(), answers


class Attention(nn.Module):
    """Attention of one contestant, ``[B, grid, grid, E] -> [B, grid, grid, E]``."""

    def __init__(self, contestant: str, sizes: Sizes, seed: int) -> None:
        super().__init__()
        self.contestant = contestant
        self.heads = sizes.heads
        self.project = nn.Linear(sizes.width, 3 * sizes.width)
        self.out = nn.Linear(sizes.width, sizes.width)
        # Zeros, so that contestants of one seed start as the same function.
        if contestant == "nprf+rpe-1d":
            self.relative_bias = nn.Parameter(torch.zeros(sizes.heads, 2 * sizes.grid**2 - 1))
        if contestant == "nprf+rpe-2d":
            self.relative_bias = nn.Parameter(torch.zeros(sizes.heads, 2 * sizes.grid - 1, 2 * sizes.grid - 1))
        self.register_buffer("projection", gaussian_projection(sizes.features, sizes.width // sizes.heads, seed=seed))

    def forward(self, x: Tensor) -> Tensor:
        batch, height, width, channels = x.shape
        qkv = self.project(x).view(batch, height, width, 3, self.heads, -1).permute(3, 0, 4, 1, 2, 5)
        feature_map = NPRF(self.projection)
        if self.contestant == "nprf+rpe-2d":
            heads = grid_attention(*qkv, self.relative_bias, feature_map=feature_map)
        else:
            n = height * width
            bias = self.relative_bias if self.contestant == "nprf+rpe-1d" else x.new_zeros(self.heads, 2 * n - 1)
            flat = (each.flatten(2, 3) for each in qkv)
            heads = kernelized_attention(*flat, bias, feature_map=feature_map, is_causal=False)
            heads = heads.unflatten(2, (height, width))
        return self.out(heads.permute(0, 2, 3, 1, 4).reshape(batch, height, width, channels))


class Block(nn.Module):
    """Attention and a feed-forward network, each behind a LayerNorm and beside a residual."""

    def __init__(self, contestant: str, sizes: Sizes, seed: int) -> None:
        super().__init__()
        self.attention = Attention(contestant, sizes, seed)
        self.norms = nn.ModuleList(nn.LayerNorm(sizes.width) for _ in range(2))
        self.feed_forward = nn.Sequential(
            nn.Linear(sizes.width, 4 * sizes.width), nn.GELU(), nn.Linear(4 * sizes.width, sizes.width)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norms[0](x))
        return x + self.feed_forward(self.norms[1](x))


class VisionModel(nn.Module):
    """Pixels ``[B, grid, grid]`` to logits of the three answers ``[B, grid, grid, 3]``.

    Every contestant has learned absolute positions, one vector for each row and one for each column.
    """

    def __init__(self, contestant: str, sizes: Sizes, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.pixels = nn.Embedding(2, sizes.width)
        self.rows = nn.Parameter(0.1 * torch.randn(sizes.grid, 1, sizes.width))
        self.columns = nn.Parameter(0.1 * torch.randn(sizes.grid, sizes.width))
        self.blocks = nn.Sequential(
            *(Block(contestant, sizes, seed * sizes.layers + layer) for layer in range(sizes.layers)),
            nn.LayerNorm(sizes.width),
        )
        self.head = nn.Linear(sizes.width, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.pixels(x) + self.rows + self.columns))


def run(name: str, seed: int, sizes: Sizes, schedule: training.Schedule, args: argparse.Namespace) -> dict[str, Any]:
    """Train one contestant from one seed."""
    model = VisionModel(name, sizes, seed).to(args.device)

    def draw(count: int, seed: int) -> list[Tensor]:
        return [x.to(args.device) for x in images(count, sizes, torch.Generator().manual_seed(seed))]

    held_out = draw(128, 2**40)

    def loss(model: nn.Module, step: int) -> Tensor:
        x, y = draw(sizes.batch, seed * 1_000_003 + step)
        return cross_entropy(model(x).flatten(0, 2), y.flatten())

    def evaluate(model: nn.Module) -> dict[str, float]:
        x, y = held_out
        predicted = torch.cat([model(part).argmax(-1) for part in x.split(sizes.batch)])
        # Most answers are "nothing": each of the three counts the same.
        return {RECALL: sum((predicted[y == k] == k).float().mean().item() for k in range(3)) / 3}

    settings = training.settings_of(schedule, args.device, **vars(sizes), contestant=name, seed=seed)
    curve = training.train(name, model, loss, evaluate, schedule, args.out / f"{name}-seed{seed}.pt", settings)
    return {"contestant": name, "seed": seed, **curve}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    training.add_arguments(parser, CONTESTANTS, "training_results/shapes")
    args = training.parse(parser)
    sizes, steps = (QUICK, 300) if args.quick else (FULL, 600)
    names = training.chosen(parser, args.contestants, CONTESTANTS, CONTESTANTS)
    schedule = training.Schedule(args.steps or steps)
    settings = training.settings_of(schedule, args.device, **vars(sizes))
    curves: list[dict[str, Any]] = []
    for name, seed in itertools.product(names, range(args.seeds)):
        curves.append(run(name, seed, sizes, schedule, args))
        training.store(curves, settings, args.out)
    training.report(curves, RECALL, args.out, "What stands three rows below and six columns right?")
    if not args.quick:
        return 0
    with_rpe, without = (training.final(curves, name, RECALL) for name in ("nprf+rpe-2d", "nprf"))
    is_better = with_rpe > without  # False where a run diverged or is missing
    print(f"{'ok' if is_better else 'error'}: nprf+rpe-2d {with_rpe:.3f}, nprf {without:.3f}; expected more with RPE")
    return 0 if is_better else 1


if __name__ == "__main__":
    sys.exit(main())
