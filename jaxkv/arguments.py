"""Numbers that users give as arguments: of Python, NumPy or JAX, checked and turned into Python's own."""

from pallas_kernels.arguments import integer, real, whole

__all__ = ["integer", "real", "whole"]
