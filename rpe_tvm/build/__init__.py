"""Compiles operators with TVM and keeps them in a cache on disk.

Importing this checks the versions of TVM and tvm-ffi and raises `rpe_tvm.errors.BuildError` for a pair that
would crash. TVM itself is imported when something is compiled.
"""

from rpe_tvm.build.manifest import check_versions

check_versions()

from rpe_tvm.build.compile import compile_operator, export, in_memory  # noqa: E402

__all__ = ["compile_operator", "export", "in_memory"]
