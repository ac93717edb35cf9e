"""Bundles of compiled attention for devices without Python: written, and verified."""

from rpe_tvm.edge.package import Packed, package
from rpe_tvm.edge.verify import Report, verify

__all__ = ["Packed", "Report", "package", "verify"]
