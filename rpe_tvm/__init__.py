"""Attention with relative positional encoding in O(n log n), compiled and tuned with TVM.

`rpe_tvm.torch` has the operator and the layer for PyTorch, `rpe_tvm.runtime` runs compiled libraries without
PyTorch and without TVM, `rpe_tvm.build` compiles them; ``python -m rpe_tvm --help`` lists the commands.
Importing this package alone imports none of them.
"""

__version__ = "0.1.0"
