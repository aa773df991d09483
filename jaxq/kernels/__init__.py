"""Products of low-bit numbers: how packed codes lie in memory, their plain meaning, and kernels for accelerators."""
