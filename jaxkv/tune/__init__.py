"""`python -m jaxkv.tune` finds the tiles, warps and stages with which paged attention is fastest on this GPU.

It writes the table that the environment variable `JAXKV_TUNING` names to programs. For each class of shapes
the search begins with the rule of `pallas_kernels.paged_attention.triton.tuning` and changes one value at a
time. Every candidate must agree with NumPy float64 before it is timed. The candidates that do are timed in
turns with the best so far, on all problems of the class. A candidate replaces the best where it is faster
beyond the spread: the lower quartile of the rounds' ratios (geometric means over the problems) above 1.01.

`problems` are what is timed, `implementation` runs one of them, `timing` compares, `search` decides; the
benchmarks use the first three too.
"""
