"""Runs the compiled operator over a long document, checks it, and measures it; see quickstart.sh."""

from __future__ import annotations

import argparse
import sys
import time

import numpy as np
import torch
from torch import Tensor

from rpe_tvm import bench, bench_turns, reference
from rpe_tvm.errors import RpeTvmError
from rpe_tvm.torch import KernelizedAttention, describe

HEADS, HEAD_DIM, NUM_FEATURES = 4, 64, 32
BENCH_LENGTHS = (1024, 4096)
CHECKED_ROWS = 64
# Root mean square of the error over that of the result. Right float32 results stay far below.
ERROR_LIMIT = 1e-4


def document(length: int) -> np.ndarray:
    """The first bytes of the topics of Python's documentation: about 700 kB of text in every CPython."""
    from pydoc_data.topics import topics

    text = "\n\n".join(topics[name] for name in sorted(topics)).encode()
    if len(text) < length:
        sys.exit(f"error: expected at most {len(text)} tokens (the document's size), got {length}")
    return np.frombuffer(text[:length], np.uint8)


def projected(tokens: np.ndarray) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value `[1, H, n, d]` of a byte embedding, with random weights as before training."""
    generator = torch.Generator().manual_seed(0)
    width = HEADS * HEAD_DIM
    table = torch.randn(256, width, generator=generator)
    embedded = table[torch.from_numpy(tokens.astype(np.int64))]
    query, key, value = (
        (embedded @ torch.randn(width, width, generator=generator) / width**0.5)
        .view(1, -1, HEADS, HEAD_DIM)
        .transpose(1, 2)
        for _ in range(3)
    )
    return query, key, value


def attention_layer(length: int) -> KernelizedAttention:
    """The layer with a bias that falls with distance, for each head at its own rate (ALiBi), plus noise."""
    layer = KernelizedAttention(HEADS, HEAD_DIM, max_length=length, num_features=NUM_FEATURES)
    distance = torch.arange(-(length - 1), length).abs()
    rates = 2.0 ** (-8 * torch.arange(1, HEADS + 1) / HEADS)
    noise = torch.randn(HEADS, 2 * length - 1, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        layer.rpe_bias.copy_(-rates[:, None] * distance + 0.1 * noise)
    return layer.eval()


@torch.no_grad()
def run_and_check(length: int) -> None:
    tokens = document(length)
    query, key, value = projected(tokens)
    layer = attention_layer(length)
    print(f"\nDocument: {length} bytes of pydoc_data.topics, beginning {bytes(tokens[:40])!r}")

    start = time.perf_counter()
    algorithm = describe(length, NUM_FEATURES, HEAD_DIM)
    print(f"Kernel for {length} tokens: {algorithm}, ready after {time.perf_counter() - start:.1f} s")

    output = layer(query, key, value)
    times = []
    for _ in range(5):
        start = time.perf_counter()
        output = layer(query, key, value)
        times.append(time.perf_counter() - start)
    print(
        f"Attention of {HEADS} heads of size {HEAD_DIM}, {NUM_FEATURES} features, with relative positions: "
        f"{1e3 * min(times):.0f} ms on {torch.get_num_threads()} threads"
    )

    rows = np.linspace(0, length - 1, CHECKED_ROWS).astype(np.int64)
    arrays = (x.detach().numpy() for x in (query, key, value, layer.rpe_bias, layer.projection))
    expected = reference.attention_rows(rows, *arrays)
    error = bench_turns.relative_error(output, rows, expected)
    print(f"Relative error of {len(rows)} rows against the float64 reference: {error:.1e}")
    if not error <= ERROR_LIMIT:  # a NaN fails, too
        sys.exit(f"error: expected at most {ERROR_LIMIT:.0e}. Please report it, with python -m rpe_tvm info")


def measure() -> None:
    print(f"\nAgainst what PyTorch offers ({torch.get_num_threads()} threads, checked before it is timed):\n")
    print(bench.table_header(), flush=True)
    rows = bench.run(
        BENCH_LENGTHS,
        heads=HEADS,
        num_features=NUM_FEATURES,
        head_dim=HEAD_DIM,
        seconds=4.0,
        describe=lambda n: describe(n, NUM_FEATURES, HEAD_DIM),
        on_row=lambda row: print(bench.table_line(row), flush=True),
    )
    for note in bench.notes(rows):
        print(note)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=16384, help="length of the document (default: %(default)s)")
    args = parser.parse_args()
    if args.tokens < 1:
        parser.error(f"--tokens: expected a positive number, got {args.tokens}")
    try:
        run_and_check(args.tokens)
        measure()
    except RpeTvmError as error:
        sys.exit(f"error: {error}")
    print(
        """
Next:
  source .venv/bin/activate
  python -m rpe_tvm info                # versions, this CPU, which tuned records apply
  python -m rpe_tvm bench               # the whole table, 512 to 16384 tokens
  python scripts/tune_x86.py            # make the kernels faster on this CPU
  bash scripts/test.sh                  # run all tests
README.md shows how to call it from PyTorch."""
    )


if __name__ == "__main__":
    main()
