"""Which algorithm, which factorisation, which length: pure Python and NumPy, neither tvm nor torch."""
