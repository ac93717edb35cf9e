"""Attention and whole models for devices without Python: packaged, and verified."""

from rpe_tvm.edge.model import export_model
from rpe_tvm.edge.package import Packed, package
from rpe_tvm.edge.verify import Report, verify

__all__ = ["Packed", "Report", "export_model", "package", "verify"]
