"""What the command lines of tuning share."""

from __future__ import annotations


def numbers(text: str) -> tuple[int, ...]:
    """Parse `512,1024` to positive numbers."""
    values = tuple(int(part) for part in text.split(","))
    if min(values) < 1:
        raise ValueError(f"expected positive numbers, got {text}")
    return values
