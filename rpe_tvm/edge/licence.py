"""The file LICENSE of what is shipped: what the package says of its own licence, and whose code is in it besides."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path

from rpe_tvm import __version__

FILE = "LICENSE"
_THIRD_PARTY = Path(__file__).resolve().parent.parent / "deploy" / "third_party.txt"


def text() -> str:
    """The content of the file."""
    try:
        known = metadata.metadata("rpe_tvm").json
        stated = known.get("license_expression") or known.get("license")
    except metadata.PackageNotFoundError:
        stated = None
    terms = f"licence: {stated}" if stated else "licence: none is stated by the package rpe_tvm; ask its authors"
    return f"rpe_tvm {__version__}\n{terms}\n\n{_THIRD_PARTY.read_text(encoding='utf-8')}"
