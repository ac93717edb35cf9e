"""What the command lines of tuning share."""

from __future__ import annotations

import argparse


def numbers(text: str) -> tuple[int, ...]:
    """Parse `512,1024` to positive numbers."""
    values = tuple(int(part) for part in text.split(","))
    if min(values) < 1:
        raise ValueError(f"expected positive numbers, got {text}")
    return values


def address(text: str) -> tuple[str, int]:
    """Parse `HOST:PORT`."""
    host, _, port = text.rpartition(":")
    if not host or not port.isdecimal():
        raise argparse.ArgumentTypeError(f"expected HOST:PORT, got {text!r}")
    return host, int(port)
